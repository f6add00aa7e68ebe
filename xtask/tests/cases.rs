//! Tests that every numbered case of the specifications has a test.
//!
//! A test names its case in a comment, `ProPos, case 9` or `SeCu, case T4`, or several at once, `SeCu, cases T4 to T6`.
//! Several tests may name the same case. `grep -rn 'ProPos, case 9' crates` finds them.

use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

/// A specification, the prefix of its case numbers, and the number of cases.
const CASES: [(&str, &str, usize); 6] = [
    ("ProPos", "", 16),
    ("SeCu", "T", 15),
    ("IMC-SwAV", "T", 16),
    ("ICBPL", "T", 15),
    ("Pretrained networks", "T", 20),
    ("Heads on frozen embeddings", "T", 15),
];

/// The comments of all sources below `folder`, one after another.
fn comments(folder: &Path, text: &mut String) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("readable").path();
        if path.is_dir() {
            comments(&path, text);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = fs::read_to_string(&path).expect("UTF-8");
            for line in source.lines().filter(|line| line.trim_start().starts_with("//")) {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
}

/// The ranges `T4 to T6` that follow `mark`.
fn ranges(text: &str, mark: &str, letter: &str) -> Vec<RangeInclusive<usize>> {
    let range = |rest: &str| {
        let (first, rest) = rest.strip_prefix(letter)?.split_once(" to ")?;
        let last = rest.strip_prefix(letter)?.split(|c: char| !c.is_ascii_digit()).next()?;
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    text.split(mark).skip(1).filter_map(range).collect()
}

#[test]
fn every_case_of_the_specifications_is_a_test() {
    let mut text = String::new();
    comments(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates"), &mut text);
    for (system, letter, count) in CASES {
        for number in 1..=count {
            let mark = format!("{system}, case {letter}{number}");
            let is_whole = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_digit());
            let found = text.split(&mark).skip(1).any(is_whole);
            let ranges = ranges(&text, &format!("{system}, cases "), letter);
            assert!(
                found || ranges.iter().any(|range| range.contains(&number)),
                "no test names `{mark}`"
            );
        }
    }
}
