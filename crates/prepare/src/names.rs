//! Names of files: what they are made of, and what they say.
//!
//! Knows no other module of this crate, so that every reader may use it.

use std::path::Path;

use stage::Split;

/// The last part of a path as text, with a replacement character for what is not UTF-8.
pub fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Where an entry lies below the root, or why it has no place there.
///
/// # Errors
///
/// A phrase that follows the name.
pub fn safe_name(name: &str) -> Result<String, &'static str> {
    const LEADS_OUT: &str = "has a name that leads out of the archive";
    let has_drive = name.as_bytes().get(1) == Some(&b':');
    if name.starts_with('/') || has_drive {
        return Err(LEADS_OUT);
    }
    if name.contains(['\0', '\u{fffd}']) {
        return Err("has a name that is not text");
    }
    let parts: Vec<&str> =
        name.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err(LEADS_OUT);
    }
    if parts.is_empty() { Err("has no name") } else { Ok(parts.join("/")) }
}

/// The last part of a path in an archive, and the folders before it.
pub fn split_name(name: &str) -> (&str, &str) {
    name.rsplit_once('/').map_or(("", name), |(folder, file)| (folder, file))
}

/// Whether a name is like a pattern: `*` stands for any signs, `{000..012}` for a number of as many
/// digits in that range.
pub fn is_like(name: &str, pattern: &str) -> bool {
    if let Some((before, rest)) = pattern.split_once('{')
        && !before.contains('*')
        && let (Some((from, to)), Some((inner, behind))) = (range_of(pattern), rest.split_once('}'))
    {
        let digits = inner.split_once("..").map_or(0, |(from, _)| from.len());
        let Some(name) = name.strip_prefix(before) else { return false };
        let Some((number, name)) = name.split_at_checked(digits) else { return false };
        let inside = number.parse().is_ok_and(|number: u64| (from..=to).contains(&number));
        return inside && number.bytes().all(|b| b.is_ascii_digit()) && is_like(name, behind);
    }
    match pattern.split_once('*') {
        None => name == pattern,
        Some((before, behind)) => {
            let Some(rest) = name.strip_prefix(before) else { return false };
            let starts = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
            starts.rev().any(|at| is_like(&rest[at..], behind))
        }
    }
}

/// The two numbers of `{000..012}`.
pub fn range_of(pattern: &str) -> Option<(u64, u64)> {
    let (_, rest) = pattern.split_once('{')?;
    let (inner, _) = rest.split_once('}')?;
    let (from, to) = inner.split_once("..")?;
    let (from, to) = (from.parse().ok()?, to.parse().ok()?);
    (from <= to).then_some((from, to))
}

/// Which split the name of a file, or the word for a split, says.
pub fn split_of(name: &str) -> Split {
    let name = name.to_ascii_lowercase();
    let says = |words: &[&str]| {
        name.split(|sign: char| !sign.is_alphanumeric()).any(|word| words.contains(&word))
    };
    if says(&["test", "t10k", "val", "valid", "validation", "dev"]) {
        Split::Test
    } else if says(&["unlabelled", "unlabeled", "unsupervised"]) {
        Split::Unlabelled
    } else {
        Split::Train
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_stand_for_the_names_that_they_look_like() {
        let pattern = "data/train-*-of-*.parquet";
        assert!(is_like("data/train-00000-of-00002.parquet", pattern));
        assert!(!is_like("data/test-00000-of-00002.parquet", pattern));
        assert!(is_like("x", "*") && is_like("", "*") && !is_like("", "a*"));
        assert!(is_like("007.tar", "{000..012}.tar") && is_like("012.tar", "{000..012}.tar"));
        for other in ["013.tar", "7.tar", "0007.tar", "00a.tar", "007.zip", "+07.tar", ""] {
            assert!(!is_like(other, "{000..012}.tar"), "{other}");
        }
        assert!(is_like("a-3-b.tar", "a-{1..9}-*.tar"));
    }

    #[test]
    fn splits_are_told_by_words() {
        assert_eq!(split_of("imagenet1k-validation-00.tar"), Split::Test);
        assert_eq!(split_of("test-00000-of-00001.parquet"), Split::Test);
        assert_eq!(split_of("train-00000-of-00001.parquet"), Split::Train);
        assert_eq!(split_of("latest.tar"), Split::Train);
        assert_eq!(split_of("Unlabeled-0.tar"), Split::Unlabelled);
    }
}
