//! Renders, splits and matches names of files.
//!
//! Uses no other module of this crate, so that every reader may use it.

use std::path::{Path, PathBuf};

use stage::Split;

/// Renders the bytes of a name as text.
///
/// Keeps valid UTF-8. Escapes every other byte, and every byte of a control character, as `\x` and
/// two hexadecimal digits, and escapes an existing `\x` as `\x5Cx`. So different bytes have
/// different texts, and no name can control a terminal.
pub fn text(bytes: &[u8]) -> String {
    let mut text = String::new();
    for chunk in bytes.utf8_chunks() {
        for sign in chunk.valid().replace("\\x", "\\x5Cx").chars() {
            match sign.is_control() {
                true => push_escaped(&mut text, sign.encode_utf8(&mut [0; 4]).as_bytes()),
                false => text.push(sign),
            }
        }
        push_escaped(&mut text, chunk.invalid());
    }
    text
}

fn push_escaped(text: &mut String, bytes: &[u8]) {
    text.extend(bytes.iter().map(|byte| format!("\\x{byte:02X}")));
}

/// The [`text`] of a path.
pub fn path_text(path: &Path) -> String {
    text(path.as_os_str().as_encoded_bytes())
}

/// The [`text`] of the last part of a path.
pub fn file_name(path: &Path) -> String {
    text(path.file_name().unwrap_or(path.as_os_str()).as_encoded_bytes())
}

/// The [`text`] of a path relative to `root`, separated by `/` on every system.
pub fn below(root: &Path, path: &Path) -> String {
    let inner = path.strip_prefix(root).unwrap_or(path);
    let parts: Vec<String> = inner.components().map(|part| path_text(part.as_ref())).collect();
    parts.join("/")
}

/// The [`text`] of each path relative to their common folder.
pub fn below_common_folder(paths: &[PathBuf]) -> Vec<String> {
    let first = paths.first().and_then(|path| path.parent()).unwrap_or(Path::new(""));
    let holds_all = |folder: &&Path| paths.iter().all(|path| path.starts_with(folder));
    let common = first.ancestors().find(holds_all).unwrap_or(Path::new(""));
    paths.iter().map(|path| below(common, path)).collect()
}

/// Returns why a file or folder of this name is always skipped: a phrase that follows the name.
///
/// The same names are skipped in folders and in archives.
pub fn left_out(name: &str) -> Option<&'static str> {
    // Thumbnails of Synology and QNAP, resource forks of macOS, recycle bins.
    const SYSTEM: [&str; 9] = [
        "__MACOSX",
        "@eaDir",
        "@Recycle",
        "@Recently-Snapshot",
        "#recycle",
        "#snapshot",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
    ];
    if name.starts_with('.') {
        return Some("is hidden");
    }
    SYSTEM.contains(&name).then_some("is a folder of the operating system")
}

/// Returns the path up to its first [skipped](left_out) part, and the reason.
pub fn left_out_part(path: &str) -> Option<(&str, &'static str)> {
    let ends = path.match_indices('/').map(|(at, _)| at).chain([path.len()]);
    ends.map(|end| &path[..end]).find_map(|part| Some((part, left_out(split_name(part).1)?)))
}

/// Normalises the name of an archive entry to a path below the archive's root.
///
/// # Errors
///
/// Why the name is not such a path: a phrase that follows it.
pub fn safe_name(name: &str) -> Result<String, &'static str> {
    const LEADS_OUT: &str = "has a name that leads out of the archive";
    let has_drive = name.as_bytes().get(1) == Some(&b':');
    if name.starts_with('/') || has_drive {
        return Err(LEADS_OUT);
    }
    if name.contains('\0') {
        return Err("has a name that is not text");
    }
    let parts: Vec<&str> =
        name.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        return Err(LEADS_OUT);
    }
    if parts.is_empty() { Err("has no name") } else { Ok(parts.join("/")) }
}

/// Splits a path in an archive into its folder and its last part.
pub fn split_name(name: &str) -> (&str, &str) {
    name.rsplit_once('/').map_or(("", name), |(folder, file)| (folder, file))
}

/// Whether a name matches a pattern. `*` matches any characters, `{000..012}` a number in that
/// range with as many digits.
pub fn is_like(name: &str, pattern: &str) -> bool {
    if let Some((before, rest)) = pattern.split_once('{')
        && !before.contains('*')
        && let (Some((from, to)), Some((inner, after))) = (range_of(pattern), rest.split_once('}'))
    {
        let digits = inner.split_once("..").map_or(0, |(from, _)| from.len());
        let Some(name) = name.strip_prefix(before) else { return false };
        let Some((number, name)) = name.split_at_checked(digits) else { return false };
        let inside = number.parse().is_ok_and(|number: u64| (from..=to).contains(&number));
        return inside && number.bytes().all(|b| b.is_ascii_digit()) && is_like(name, after);
    }
    match pattern.split_once('*') {
        None => name == pattern,
        Some((before, after)) => {
            let Some(rest) = name.strip_prefix(before) else { return false };
            let starts = rest.char_indices().map(|(at, _)| at).chain([rest.len()]);
            starts.rev().any(|at| is_like(&rest[at..], after))
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

/// Returns the split that a file name or a word states; training if none.
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
    fn different_bytes_have_different_texts() {
        assert_eq!(text("Vögel/1.jpg".as_bytes()), "Vögel/1.jpg");
        assert_eq!(text(b"V\xf6gel"), r"V\xF6gel");
        assert_eq!(text(b"a\xe2\x82"), r"a\xE2\x82");
        assert_eq!(text(b"\x1b[31m\n"), r"\x1B[31m\x0A");
        assert_eq!(text("\u{85}".as_bytes()), r"\xC2\x85");
        assert_eq!(text(r"a\b".as_bytes()), r"a\b");
        // A name that looks escaped differs from an escaped name.
        let names: [&[u8]; 6] =
            [b"\xe9", br"\xE9", br"\x5CxE9", br"\\xE9", b"\\\xe9", b"\\x5C\xe9"];
        let texts: std::collections::BTreeSet<String> =
            names.iter().map(|name| text(name)).collect();
        assert_eq!(texts.len(), names.len(), "{texts:?}");
    }

    #[test]
    fn files_of_one_name_in_two_folders_keep_their_folders() {
        let paths = ["/a/train/0.tar", "/a/test/0.tar"].map(PathBuf::from);
        assert_eq!(below_common_folder(&paths), ["train/0.tar", "test/0.tar"]);
        assert_eq!(below_common_folder(&paths[..1]), ["0.tar"]);
        assert_eq!(below_common_folder(&["x/0", "x/1"].map(PathBuf::from)), ["0", "1"]);
        assert_eq!(below_common_folder(&["x/0", "1"].map(PathBuf::from)), ["x/0", "1"]);
    }

    #[test]
    fn hidden_and_system_folders_are_skipped_at_every_level() {
        assert_eq!(left_out_part("cat/1.jpg"), None);
        assert_eq!(left_out_part("a/.git/b/1.jpg"), Some(("a/.git", "is hidden")));
        assert_eq!(left_out_part("cat/._1.jpg"), Some(("cat/._1.jpg", "is hidden")));
        for folder in ["__MACOSX", "@eaDir", "#recycle"] {
            let path = format!("cat/{folder}/1.jpg/x.jpg");
            let (part, reason) = left_out_part(&path).expect("left out");
            assert_eq!((part, reason), (&path[..4 + folder.len()], left_out(folder).expect("too")));
        }
        assert_eq!(left_out("eaDir"), None);
    }

    #[test]
    fn patterns_match_names() {
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
    fn splits_are_recognised_by_words() {
        assert_eq!(split_of("imagenet1k-validation-00.tar"), Split::Test);
        assert_eq!(split_of("test-00000-of-00001.parquet"), Split::Test);
        assert_eq!(split_of("train-00000-of-00001.parquet"), Split::Train);
        assert_eq!(split_of("latest.tar"), Split::Train);
        assert_eq!(split_of("Unlabeled-0.tar"), Split::Unlabelled);
    }
}
