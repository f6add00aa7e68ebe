//! Text in HTML.

/// Escapes text for HTML between tags, whatever the direction of its writing: its order does not change
/// that of the text around it.
pub fn inline(text: &str) -> String {
    format!("<bdi>{}</bdi>", escaped(text))
}

/// Escapes text for HTML, also inside a quoted attribute; [`displayable`].
pub fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in displayable(text).chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            c => escaped.push(c),
        }
    }
    escaped
}

/// Replaces control characters by U+FFFD: HTML has no other form for them. So it does with the characters that
/// override the direction of writing, which could show `photo<U+202E>gpj.exe` as a picture.
pub fn displayable(text: &str) -> String {
    let shown = |c: char| match c {
        '\n' | '\t' => c,
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => char::REPLACEMENT_CHARACTER,
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_quotes_and_control_characters_are_escaped() {
        assert_eq!(
            escaped("<a href=\"x\">'&'</a>"),
            "&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;&lt;/a&gt;"
        );
        assert_eq!(escaped("a\u{1b}[31m\0b"), "a\u{fffd}[31m\u{fffd}b");
        assert_eq!(escaped("photo\u{202e}gpj.exe"), "photo\u{fffd}gpj.exe");
        assert_eq!(inline("\u{5d0}<"), "<bdi>\u{5d0}&lt;</bdi>");
    }
}
