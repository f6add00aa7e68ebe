//! The experiment: one TOML file with every value except the seed.
//!
//! This module reads `title`, `system`, `[rounds]`, `[stages]`, `[control]` and the source under
//! `[prepare]`. Every other table belongs to the program of its name, and only that program knows its
//! keys.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::change::{self, Keys, TableChange};
use crate::shared::{self, SHARED};
use crate::{Library, digest};

/// An experiment with every value that one run uses: what it extends is merged into it.
#[derive(Debug, Clone)]
pub struct Experiment {
    /// Stem of its file: the name for commands and for the folder of results.
    pub name: String,
    /// The file it was read from, for messages.
    pub path: PathBuf,
    /// Resolved: every value is where it is used.
    pub(crate) tables: Table,
    /// The same with the table `[shared]`, and references to it in place of values.
    unresolved: Table,
    /// What [`Experiment::set`] changed, but for shared values.
    changes: Vec<TableChange>,
}

/// The table `[rounds]`: the order of the steps.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Rounds {
    /// How many rounds follow round 0.
    pub rounds: usize,
    /// Places of round 0, in order.
    pub first: Vec<String>,
    /// Places of each later round, in order.
    pub then: Vec<String>,
}

impl Experiment {
    /// Reads the experiment in a file. Its bases are beside it or in the folder `configs`.
    pub fn read(path: &Path) -> Result<Self> {
        Library::default().read(path)
    }

    /// Parses an experiment that is not in a file and has no bases.
    pub fn of_text(name: &str, text: &str) -> Result<Self> {
        let tables = text.parse().with_context(|| format!("`{name}` is not TOML"))?;
        Ok(Self { name: name.to_owned(), ..Self::of_tables(PathBuf::from(name), tables)? })
    }

    /// Resolves the tables of an experiment, whose bases are merged into them.
    pub(crate) fn of_tables(path: PathBuf, unresolved: Table) -> Result<Self> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let tables = shared::resolve(unresolved.clone())?;
        Ok(Self { name, path, tables, unresolved, changes: vec![] })
    }

    /// Changes one value: `assignment` is `table.key=value`, where the value is TOML and a single word
    /// needs no quotes. An inline table, `{ … }`, replaces the old one. A shared value,
    /// `shared.key=value`, changes wherever it is used, except where the value was set directly.
    ///
    /// # Errors
    ///
    /// The experiment has no such key, or no table uses the shared value: nothing would change.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        change::assignment(assignment)
            .and_then(|change| self.apply(change))
            .with_context(|| format!("--set {assignment}, in `{}`", self.path.display()))
    }

    fn apply(&mut self, change: TableChange) -> Result<()> {
        if change.paths().iter().any(|path| path.first() == Some(&SHARED)) {
            let mut unresolved = self.unresolved.clone();
            change.clone().apply(&mut unresolved, Keys::Known)?;
            shared::refuse_unused(&change, &unresolved)?;
            self.tables = shared::resolve(unresolved.clone())?;
            self.unresolved = unresolved;
            return std::mem::take(&mut self.changes).into_iter().try_for_each(|c| self.apply(c));
        }
        change.clone().apply(&mut self.tables, Keys::Known)?;
        // What was set may itself take a shared value.
        let shared = self.unresolved.get(SHARED).map(|shared| (SHARED.to_owned(), shared.clone()));
        self.tables.extend(shared);
        self.tables = shared::resolve(std::mem::take(&mut self.tables))?;
        self.changes.push(change);
        Ok(())
    }

    /// The same experiment with the values that `[control]` names, or `None` where it is empty.
    pub fn control(&self) -> Result<Option<Self>> {
        let overrides = match self.tables.get("control") {
            None => return Ok(None),
            Some(Value::Table(table)) if table.is_empty() => return Ok(None),
            Some(Value::Table(table)) => table.clone(),
            Some(_) => bail!("`control` of `{}` is not a table", self.path.display()),
        };
        let mut control = self.clone();
        for (key, value) in overrides {
            // As with `--set`, a table at a dotted path replaces the old one.
            let change = match key.contains('.') {
                true => TableChange::at(&key, value),
                false => TableChange::Table(BTreeMap::from([(key, value.into())])),
            };
            change
                .apply(&mut control.tables, Keys::Known)
                .with_context(|| format!("table `[control]` of `{}`", self.path.display()))?;
        }
        Ok(Some(control))
    }

    /// The same experiment as k-means on the pixels, where `embed` and `clustering` can do that.
    pub fn pixels(&self) -> Option<Self> {
        let mut pixels = self.clone();
        for (key, value) in [
            ("embed.pixels", Value::from(true)),
            ("clustering.heads", Value::from(0)),
            ("clustering.neighbours", Value::from(0)),
            ("clustering.kmeans-metric", Value::from("euclidean")),
        ] {
            TableChange::at(key, value).apply(&mut pixels.tables, Keys::Known).ok()?;
        }
        Some(pixels)
    }

    /// What people call the experiment, key `title`.
    pub fn title(&self) -> Result<String> {
        self.parsed("title")
    }

    /// The method it runs, key `system`.
    pub fn system(&self) -> Result<String> {
        self.parsed("system")
    }

    /// The order of the steps.
    pub fn rounds(&self) -> Result<Rounds> {
        self.parsed("rounds")
    }

    /// The program of each place: a stage by its name, or the path of any executable.
    pub fn stages(&self) -> Result<BTreeMap<String, String>> {
        self.parsed("stages")
    }

    /// The source of the pictures, unless the command line names another one.
    pub fn source(&self) -> Result<String> {
        let prepare: Table = self.parsed("prepare")?;
        let source = prepare.get("source").and_then(Value::as_str).map(str::to_owned);
        source.with_context(|| {
            format!("table `[prepare]` of `{}` has no text `source`", self.path.display())
        })
    }

    /// Whether there is a table `[name]`: an experiment has those of the stages that it runs.
    pub fn has_table(&self, name: &str) -> bool {
        self.tables.contains_key(name)
    }

    /// The value of the key `name` at the top, such as a table, unread.
    pub fn value(&self, name: &str) -> Option<&Value> {
        self.tables.get(name)
    }

    /// The table `[name]` as a value of the caller's type. A missing table is read as an empty
    /// one, so that the error names the first key it lacks.
    ///
    /// # Errors
    ///
    /// A key is unknown, missing, or of the wrong type: there are no defaults in code.
    pub fn table<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let value = match self.tables.get(name) {
            None => Table::new(),
            Some(Value::Table(table)) => table.clone(),
            Some(other) => bail!(
                "`{name}` of `{}` is {}, not a table `[{name}]`",
                self.path.display(),
                change::kind(other)
            ),
        };
        value.try_into().map_err(|error| self.unusable(&format!("table `[{name}]`"), &error))
    }

    /// Fails at a table that none of these programs reads.
    pub fn refuse_tables_but(&self, known: &[&str]) -> Result<()> {
        for name in self.tables.keys() {
            if !known.contains(&name.as_str()) {
                bail!(
                    "no stage reads `{name}` of `{}`; known are {}",
                    self.path.display(),
                    known.join(", ")
                );
            }
        }
        Ok(())
    }

    /// The experiment as TOML, keys sorted.
    pub fn to_toml(&self) -> String {
        self.tables.to_string()
    }

    /// Hex SHA-256 of [`Experiment::to_toml`]: equal for equal values, whichever file gives them.
    pub fn digest(&self) -> String {
        digest::sha256(self.to_toml().as_bytes())
    }

    fn parsed<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        let value = self
            .tables
            .get(key)
            .with_context(|| format!("`{}` has no `{key}`", self.path.display()))?;
        value.clone().try_into().map_err(|error| self.unusable(&format!("`{key}`"), &error))
    }

    fn unusable(&self, what: &str, error: &toml::de::Error) -> anyhow::Error {
        // toml's messages end with a newline.
        let reason = error.to_string();
        anyhow::anyhow!("{what} of `{}` is not usable: {}", self.path.display(), reason.trim())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        title = "Example"
        system = "PLDC"
        [rounds]
        rounds = 1
        first = ["embed"]
        then = []
        [control]
        "refinement.weight" = 0
        [refinement]
        weight = 0.5
        precision = "f32"
        [refinement.backbone]
        width = 16
    "#;

    fn example() -> Experiment {
        Experiment::of_tables("example.toml".into(), TEXT.parse().expect("TOML")).expect("sound")
    }

    fn set(assignment: &str) -> Result<Table> {
        let mut experiment = example();
        experiment.set(assignment)?;
        Ok(experiment.tables["refinement"].as_table().expect("a table").clone())
    }

    fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
        format!("{:#}", result.expect_err("an error"))
    }

    #[test]
    fn a_value_is_set_in_the_type_it_has() {
        assert_eq!(set("refinement.weight=2").expect("known")["weight"], Value::Float(2.));
        assert_eq!(set("refinement.weight = 1e-3").expect("known")["weight"], Value::Float(1e-3));
        assert_eq!(set("refinement.precision=bf16").expect("known")["precision"], "bf16".into());
        assert_eq!(set("refinement.precision='b'").expect("known")["precision"], "b".into());
        let deep = set("refinement.backbone.width=8").expect("known");
        assert_eq!(deep["backbone"]["width"], Value::Integer(8));
        let mut experiment = example();
        experiment.set("control.\"refinement.weight\"=3").expect("known");
        assert_eq!(experiment.tables["control"]["refinement.weight"], Value::Integer(3));
    }

    /// As the constraint of `secu`, which has other keys under another rule.
    #[test]
    fn a_table_that_is_written_out_takes_the_place_of_the_whole() {
        let written = set("refinement . backbone = {depth='18', stem='7x7'}").expect("known");
        let want = "depth = '18'\nstem = '7x7'".parse::<Table>().expect("TOML");
        assert_eq!(written["backbone"], Value::Table(want.clone()));
        assert_eq!(written["precision"], "f32".into(), "what is beside it stays");
        assert!(message(set("refinement.back={a=1}")).contains("no key `back`"));
        assert!(message(set("refinement.weight={a=1}")).contains("cannot become"));

        let mut example = example();
        let change = ("refinement.backbone".to_owned(), Value::Table(want.clone()));
        example.tables["control"] = Value::Table(Table::from_iter([change]));
        let control = example.control().expect("sound").expect("there is one");
        assert_eq!(control.tables["refinement"]["backbone"], Value::Table(want));
    }

    #[test]
    fn a_shared_value_is_set_wherever_it_is_used() {
        let text = "[a]\nviews = { from = 'views' }\nwidth = 3\n[b]\nviews = { from = 'views' }\n\
                    [shared]\nviews = [1, 2]\nwidth = 8";
        let mut example = Experiment::of_text("example", text).expect("sound");
        for assignment in ["a.width=4", "shared.views=[5]", "b.views=[6]", "shared.views=[7]"] {
            example.set(assignment).expect(assignment);
        }
        let want = "[a]\nviews = [7]\nwidth = 4\n[b]\nviews = [6]";
        assert_eq!(example.tables, want.parse::<Table>().expect("TOML"));
        example.set("b.views={from='width'}").expect("another shared value");
        assert_eq!(example.tables["b"]["views"], Value::Integer(8));
        assert!(message(example.set("shared.veiws=[1]")).contains("no key `veiws`"));

        let mut example = Experiment::of_text("example", text).expect("sound");
        assert!(message(example.set("shared.width=9")).contains("changes nothing"));
        assert_eq!(example.tables["a"]["views"].as_array().map(Vec::len), Some(2));
    }

    #[test]
    fn what_cannot_be_set_is_said_with_the_keys_there_are() {
        let unknown = message(set("refinement.wait=1"));
        for part in ["[refinement]", "`wait`", "backbone, precision, weight", "example.toml"] {
            assert!(unknown.contains(part), "{part} is not in: {unknown}");
        }
        assert!(message(set("refine.weight=1")).contains("no table `[refine]`"));
        assert!(message(set("refinement.weight=heavy")).contains("cannot become"));
        assert!(message(set("refinement.backbone=1")).contains("name one of its keys: width"));
        assert!(message(set("refinement.weight")).contains("table.key=value"));
    }

    #[test]
    fn the_control_changes_only_what_it_names() {
        let control = example().control().expect("sound").expect("there is one");
        assert_eq!(control.tables["refinement"]["weight"], Value::Float(0.));
        assert_eq!(control.tables["refinement"]["precision"], "f32".into());

        let mut none = example();
        none.tables.insert("control".into(), Value::Table(Table::new()));
        assert!(none.control().expect("sound").is_none());
        none.tables.insert(
            "control".into(),
            Value::Table(Table::from_iter([("refinement.w".to_owned(), 1.into())])),
        );
        assert!(message(none.control()).contains("[control]"));
    }

    #[test]
    fn pixels_need_the_keys_of_embed_and_clustering() {
        assert!(example().pixels().is_none());
        let mut experiment = example();
        let tables = "embed.pixels = false
            [clustering]\nheads = 6\nneighbours = 20\nkmeans-metric = \"spherical\"";
        experiment.tables.extend(tables.parse::<Table>().expect("TOML"));
        let pixels = experiment.pixels().expect("there");
        assert_eq!(pixels.tables["embed"]["pixels"], Value::Boolean(true));
        assert_eq!(pixels.tables["clustering"]["heads"], Value::Integer(0));
    }

    #[test]
    fn an_unread_table_is_an_error() {
        let known = ["title", "system", "rounds", "control"];
        assert!(message(example().refuse_tables_but(&known)).contains("`refinement`"));
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    #[expect(dead_code, reason = "only parsed")]
    struct Refinement {
        weight: f64,
        precision: String,
        backbone: Table,
    }

    #[test]
    fn a_table_is_read_and_an_unknown_key_is_named_with_table_and_file() {
        let read = |text: &str| {
            let mut example = example();
            example.tables = text.parse().expect("TOML");
            example.table::<Refinement>("refinement")
        };
        read(TEXT).expect("usable");
        let typo = message(read(&TEXT.replace("precision", "precisoin")));
        for part in ["[refinement]", "example.toml", "precisoin", "expected one of"] {
            assert!(typo.contains(part), "{part} is not in: {typo}");
        }
        let missing = message(read(""));
        assert!(missing.contains("missing field `weight`"), "{missing}");
        assert!(message(read("refinement = 1")).contains("a whole number, not a table"));
    }
}
