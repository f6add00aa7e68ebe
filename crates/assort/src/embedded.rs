//! The experiments and the digits, as part of the program.

use std::sync::LazyLock;

use include_dir::{Dir, File, include_dir};
use xtask::EmbeddedData;

static CONFIGS: Dir = include_dir!("$CARGO_MANIFEST_DIR/../../configs");
static DIGITS: Dir = include_dir!("$CARGO_MANIFEST_DIR/../../data/digits");

/// Name without `.toml` and text of every experiment and every base.
pub fn experiments() -> &'static [(&'static str, &'static str)] {
    static EXPERIMENTS: LazyLock<Vec<(&str, &str)>> = LazyLock::new(|| {
        let named = |file: &'static File| {
            let name = file.path().to_str()?.strip_suffix(".toml")?;
            Some((name, file.contents_utf8()?))
        };
        files(&CONFIGS).into_iter().filter_map(named).collect()
    });
    &EXPERIMENTS
}

/// The data sets that ship with the program.
pub fn data() -> Vec<EmbeddedData> {
    let files = files(&DIGITS).into_iter();
    let named = files.filter_map(|file| Some((file.path().to_str()?, file.contents())));
    vec![EmbeddedData { folder: "data/digits", files: named.collect() }]
}

fn files(folder: &'static Dir) -> Vec<&'static File<'static>> {
    folder.files().chain(folder.dirs().flat_map(files)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_embedded_is_what_lies_in_the_workspace() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let (name, text) = experiments().iter().find(|(name, _)| *name == "digits").expect("there");
        let file = root.join("configs").join(format!("{name}.toml"));
        assert_eq!(std::fs::read_to_string(file).expect("there"), *text);
        let digits = &data()[0];
        for (name, bytes) in &digits.files {
            let file = root.join(digits.folder).join(name);
            assert_eq!(std::fs::read(file).expect("there"), *bytes, "{name}");
        }
        assert!(digits.files.iter().any(|(name, _)| name.contains("images")));
    }
}
