//! The library of experiments, and how one extends others.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use toml::{Table, Value};

use crate::change::{Keys, TableChange, kind};
use crate::{Experiment, shared};

/// The experiments in a folder, and those embedded in a program.
///
/// The key `extends` at the top of an experiment names its bases:
/// `extends = ["data/dogs-small", "method/propos"]`. Their tables are merged in this order and the
/// file's own last; of two values the later one counts. A table under a header merges with the old
/// one; an inline table, like any other value, replaces it. A base `x` is `x.toml` beside the file that
/// names it or beside one that extends that file, else in the folder of this library, else an
/// embedded one; it may extend others.
///
/// Tables of an experiment can share values: `[shared.views]` holds some, and
/// `views = { from = "views" }` takes them; both may be in different files. Keys beside `from` replace
/// the taken ones. An opened experiment has every value where it is used, and no `[shared]`.
#[derive(Debug, Clone)]
pub struct Library {
    /// Folder of the experiments; it need not exist.
    pub folder: PathBuf,
    /// Experiments that are part of the program: name without `.toml`, such as `data/digits`, and
    /// text.
    pub embedded: &'static [(&'static str, &'static str)],
}

/// The folder of experiments unless a program says otherwise.
pub const FOLDER: &str = "configs";

impl Default for Library {
    /// The folder `configs`, and nothing embedded.
    fn default() -> Self {
        Self::in_folder(FOLDER)
    }
}

/// A text that holds an experiment.
#[derive(Debug, Clone, PartialEq, Eq)]
enum ExperimentText {
    File(PathBuf),
    Embedded(&'static str),
}

impl ExperimentText {
    /// For messages, and as the path of the experiment.
    fn path(&self) -> PathBuf {
        match self {
            Self::File(path) => path.clone(),
            Self::Embedded(name) => format!("<built-in>/{name}.toml").into(),
        }
    }

    fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(one), Self::File(other)) => {
                one == other
                    || matches!((fs::canonicalize(one), fs::canonicalize(other)), (Ok(a), Ok(b)) if a == b)
            }
            (one, other) => one == other,
        }
    }
}

impl Library {
    /// The experiments in a folder, and nothing embedded.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into(), embedded: &[] }
    }

    /// All experiments, sorted by name.
    pub fn experiments(&self) -> Result<Vec<Experiment>> {
        self.names()?.iter().map(|name| self.open(name)).collect()
    }

    /// Opens the experiment of this name, or the file that `word` names when it looks like a path.
    pub fn open(&self, word: &str) -> Result<Experiment> {
        if word.ends_with(".toml") || word.contains(['/', '\\']) {
            return self.read(Path::new(word));
        }
        let source = self.named(word).with_context(|| {
            format!("there is no experiment `{word}`; `assort list` prints the names")
        })?;
        self.resolve(source)
    }

    /// Reads the experiment in a file.
    pub fn read(&self, path: &Path) -> Result<Experiment> {
        self.resolve(ExperimentText::File(path.to_owned()))
    }

    /// Names of the experiments, sorted, without bases, which are in subfolders.
    pub fn names(&self) -> Result<Vec<String>> {
        let embedded = self.embedded.iter().map(|(name, _)| *name);
        let mut names: BTreeSet<String> =
            embedded.filter(|name| !name.contains('/')).map(str::to_owned).collect();
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            read => Some(read.with_context(|| format!("reading `{}`", self.folder.display()))?),
        };
        for entry in entries.into_iter().flatten() {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                names.extend(path.file_stem().map(|stem| stem.to_string_lossy().into_owned()));
            }
        }
        Ok(names.into_iter().collect())
    }

    fn resolve(&self, source: ExperimentText) -> Result<Experiment> {
        let mut tables = Table::new();
        let own = self.merge(&source, &mut tables, &mut Vec::new())?;
        let path = source.path();
        shared::refuse_unused(&own, &tables)
            .and_then(|()| Experiment::of_tables(path.clone(), tables))
            .with_context(|| format!("`{}`", path.display()))
    }

    /// Merges `source` and all its bases into `tables`. Returns the change that `source` itself makes.
    ///
    /// - `above`: the experiments that led here, each a base of the one before it.
    fn merge(
        &self,
        source: &ExperimentText,
        tables: &mut Table,
        above: &mut Vec<ExperimentText>,
    ) -> Result<TableChange> {
        let path = source.path();
        let mut change = TableChange::parse(&self.text(source)?)
            .with_context(|| format!("the experiment `{}` is not TOML", path.display()))?;
        above.push(source.clone());
        for base in take_bases(&mut change).with_context(|| format!("`{}`", path.display()))? {
            let found = self.base(&base, above)?;
            if above.iter().any(|other| other.is(&found)) {
                let chain: Vec<_> =
                    above.iter().chain([&found]).map(|s| s.path().display().to_string()).collect();
                bail!("`extends` goes round in a circle: {}", chain.join(" -> "))
            }
            self.merge(&found, tables, above)?;
        }
        above.pop();
        let own = change.clone();
        change.apply(tables, Keys::New).with_context(|| format!("`{}`", path.display()))?;
        Ok(own)
    }

    fn text(&self, source: &ExperimentText) -> Result<String> {
        match source {
            ExperimentText::Embedded(name) => {
                let found = self.embedded.iter().find(|(other, _)| other == name);
                Ok(found.map(|(_, text)| (*text).to_owned()).unwrap_or_default())
            }
            ExperimentText::File(path) => fs::read_to_string(path)
                .with_context(|| format!("opening the experiment `{}`", path.display())),
        }
    }

    /// The experiment `name` in the folder, or else the embedded one.
    fn named(&self, name: &str) -> Option<ExperimentText> {
        let file = ExperimentText::File(self.folder.join(format!("{name}.toml")));
        exists(&file).then_some(file).or_else(|| self.embedded(name))
    }

    fn embedded(&self, name: &str) -> Option<ExperimentText> {
        let found = self.embedded.iter().find(|(other, _)| *other == name);
        found.map(|(name, _)| ExperimentText::Embedded(name))
    }

    /// The base that the last of `above` names. An experiment is never its own base, so that it can
    /// extend another one of its name in another folder.
    fn base(&self, name: &str, above: &[ExperimentText]) -> Result<ExperimentText> {
        let file = |folder: &Path| ExperimentText::File(folder.join(format!("{name}.toml")));
        let beside = |source: &ExperimentText| match source {
            ExperimentText::File(path) => path.parent().map(file),
            ExperimentText::Embedded(own) => own
                .rsplit_once('/')
                .and_then(|(folder, _)| self.embedded(&format!("{folder}/{name}"))),
        };
        let elsewhere = [Some(file(&self.folder)), self.embedded(name)];
        let mut candidates: Vec<ExperimentText> =
            above.iter().rev().filter_map(beside).chain(elsewhere.into_iter().flatten()).collect();
        candidates.dedup();
        let source = above.last().context("a base has an experiment that extends it")?;
        let found = candidates.iter().find(|found| exists(found) && !found.is(source));
        found.cloned().with_context(|| {
            let looked_at: Vec<_> = candidates
                .iter()
                .map(|candidate| format!("`{}`", candidate.path().display()))
                .collect();
            format!(
                "`{}` extends `{name}`, which is missing; looked at {}",
                source.path().display(),
                looked_at.join(", ")
            )
        })
    }
}

fn exists(source: &ExperimentText) -> bool {
    match source {
        ExperimentText::File(path) => path.is_file(),
        ExperimentText::Embedded(_) => true,
    }
}

/// Takes the key `extends` out of an experiment.
fn take_bases(change: &mut TableChange) -> Result<Vec<String>> {
    let TableChange::Table(keys) = change else { return Ok(vec![]) };
    let bases = match keys.remove("extends") {
        None => return Ok(vec![]),
        Some(TableChange::Value(Value::Array(bases))) => bases,
        Some(TableChange::Value(other)) => {
            bail!("`extends` is {}; it must be a list of names, as in [\"digits\"]", kind(&other))
        }
        Some(TableChange::Table(_)) => bail!("`extends` is a table; it must be a list of names"),
    };
    let name = |base: Value| match base {
        Value::String(name) => {
            ensure!(!name.is_empty(), "`extends` names an experiment without a name");
            Ok(name)
        }
        other => bail!("`extends` holds {other}, {}; it must hold names", kind(&other)),
    };
    bases.into_iter().map(name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMBEDDED: &[(&str, &str)] = &[
        ("digits", "extends = ['data/digits', 'method/propos']\ntitle = 'Digits'"),
        ("data/digits", "[data]\nclusters = 10"),
        ("method/propos", "extends = ['byol']\nsystem = 'ProPos'\n[propos]\nnoise = 0.001"),
        ("method/byol", "[propos]\nepochs = 100\nnoise = 0.0"),
    ];

    /// A folder with these files, as a library with [`EMBEDDED`].
    fn library(files: &[(&str, &str)]) -> (tempfile::TempDir, Library) {
        let folder = tempfile::tempdir().expect("a folder");
        for (name, text) in files {
            let path = folder.path().join("configs").join(name);
            fs::create_dir_all(path.parent().expect("a folder")).expect("created");
            fs::write(path, text).expect("written");
        }
        let library = Library { folder: folder.path().join("configs"), embedded: EMBEDDED };
        (folder, library)
    }

    fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
        format!("{:#}", result.expect_err("an error"))
    }

    fn table(text: &str) -> Table {
        text.parse().expect("TOML")
    }

    #[test]
    fn embedded_experiments_serve_where_there_is_no_folder() {
        let (_folder, library) = library(&[]);
        let digits = library.open("digits").expect("embedded");
        let expected = "system = 'ProPos'\ntitle = 'Digits'\n[data]\nclusters = 10\n[propos]\n\
                        epochs = 100\nnoise = 0.001";
        assert_eq!(digits.tables, table(expected));
        assert_eq!(digits.name, "digits");
        assert_eq!(library.names().expect("named"), ["digits"]);
    }

    #[test]
    fn bases_are_merged_in_order_and_the_file_itself_last() {
        let (_folder, library) = library(&[
            ("data/a.toml", "[data]\nclusters = 3\n[x]\nfirst = 1\nlast = 1\nlist = [1, 2]"),
            ("method/b.toml", "extends = ['c']\n[x]\nlast = 2\nlist = [3]"),
            ("method/c.toml", "[x]\nlast = 9\nnext = 9"),
            ("own.toml", "extends = ['data/a', 'method/b']\ntitle = 'Own'\n[x]\nown = 4"),
        ]);
        let own = library.open("own").expect("sound");
        let expected = "title = 'Own'\n[data]\nclusters = 3\n[x]\nfirst = 1\nlast = 2\n\
                        list = [3]\nnext = 9\nown = 4";
        assert_eq!(own.tables, table(expected));
        assert_eq!(library.names().expect("named"), ["digits", "own"]);
        assert_eq!(library.read(&own.path).expect("sound").digest(), own.digest());
        let text = own.to_toml();
        assert_eq!(Experiment::of_text("own", &text).expect("TOML").digest(), own.digest());
    }

    #[test]
    fn a_base_lies_beside_its_experiment_else_in_the_folder_else_in_the_program() {
        let files = [
            ("data/digits.toml", "[data]\nclusters = 11"),
            ("../mine/one.toml", "extends = ['data/digits', 'two', 'method/byol']"),
            ("../mine/two.toml", "[two]\nx = 2"),
            ("../mine/digits.toml", "extends = ['digits']\ntitle = 'Mine'"),
            ("../mine/more/three.toml", "extends = ['more/four']"),
            ("../mine/three.toml", "extends = ['more/three']"),
            ("../mine/more/four.toml", "[four]\nx = 4"),
        ];
        let (folder, library) = library(&files);
        // Beside `three`, which extends the one that extends it.
        let three = library.read(&folder.path().join("mine/three.toml")).expect("sound");
        assert_eq!(three.tables, table("[four]\nx = 4"));
        let one = library.read(&folder.path().join("mine/one.toml")).expect("sound");
        let expected = "[data]\nclusters = 11\n[two]\nx = 2\n[propos]\nepochs = 100\nnoise = 0.0";
        assert_eq!(one.tables, table(expected));
        // The one of the program, which extends the data set in the folder.
        let digits = library.read(&folder.path().join("mine/digits.toml")).expect("sound");
        assert_eq!(digits.title().expect("said"), "Mine");
        assert_eq!(digits.tables["data"], Value::Table(table("clusters = 11")));
    }

    #[test]
    fn a_value_that_a_base_shares_is_found_where_another_takes_it() {
        let (_folder, library) = library(&[
            ("data/a.toml", "[shared.views]\nflip = 0.5\n[shared.mild]\nflip = 0.1"),
            ("method/b.toml", "[x]\nviews = { from = 'views' }\n[y]\nviews = 3"),
            ("own.toml", "extends = ['data/a', 'method/b']\n[shared.views]\nflip = 0.25"),
            ("none.toml", "extends = ['own']\n[shared.mild]\nflip = 0.2"),
            ("lost.toml", "extends = ['own']\n[y]\nviews = { from = 'veiws' }"),
        ]);
        let own = library.open("own").expect("sound");
        assert_eq!(own.tables, table("[x]\nviews.flip = 0.25\n[y]\nviews = 3"));
        let unused = message(library.open("none"));
        for part in ["none.toml", "`shared.mild.flip` changes nothing"] {
            assert!(unused.contains(part), "{part} is not in: {unused}");
        }
        let lost = message(library.open("lost"));
        assert!(lost.contains("lost.toml") && lost.contains("no `veiws`"), "{lost}");
        let all = library.experiments().map(|all| all.len());
        assert!(all.is_err(), "two of them are not sound");
    }

    #[test]
    fn a_missing_base_a_circle_and_a_wrong_type_are_errors_that_name_the_files() {
        let (_folder, library) = library(&[
            ("lost.toml", "extends = ['data/nowhere']"),
            ("a.toml", "extends = ['b']"),
            ("b.toml", "extends = ['a']"),
            ("self.toml", "extends = ['self']"),
            ("text.toml", "extends = 'digits'"),
            ("number.toml", "extends = [3]"),
            ("wrong.toml", "extends = ['digits']\n[data]\nclusters = 'ten'"),
            ("broken.toml", "[data"),
        ]);
        let open = |name| message(library.open(name));
        let lost = open("lost");
        for part in ["lost.toml", "`data/nowhere`", "configs/data/nowhere.toml"] {
            assert!(lost.contains(part), "{part} is not in: {lost}");
        }
        let circle = open("a");
        assert!(circle.contains("in a circle") && circle.contains("b.toml -> "), "{circle}");
        assert!(open("self").contains("extends `self`, which is missing"));
        assert!(open("text").contains("`extends` is a text; it must be a list"));
        assert!(open("number").contains("`extends` holds 3, a whole number"));
        let wrong = open("wrong");
        assert!(wrong.contains("wrong.toml") && wrong.contains("`data.clusters`"), "{wrong}");
        assert!(open("broken").contains("broken.toml` is not TOML"));
        assert!(open("nowhere").contains("`assort list`"));
        assert!(open("nowhere.toml").contains("`nowhere.toml`"));
    }
}
