//! Tests that every numbered case of the systems' specifications has a test.
//!
//! A test names its case in a comment, `ProPos, case 9` or `SeCu, case T4`. Several tests may name
//! the same case. `grep -rn 'ProPos, case 9' crates` finds them.

use std::fs;
use std::path::Path;

/// A system, the prefix of its case numbers, and the number of cases.
const CASES: [(&str, &str, usize); 4] =
    [("ProPos", "", 16), ("SeCu", "T", 15), ("IMC-SwAV", "T", 16), ("ICBPL", "T", 15)];

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

#[test]
fn every_case_of_the_specifications_is_a_test() {
    let mut text = String::new();
    comments(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates"), &mut text);
    for (system, letter, count) in CASES {
        for number in 1..=count {
            let mark = format!("{system}, case {letter}{number}");
            let is_whole = |rest: &str| !rest.starts_with(|c: char| c.is_ascii_digit());
            let found = text.split(&mark).skip(1).any(is_whole);
            assert!(found, "no test names `{mark}`");
        }
    }
}
