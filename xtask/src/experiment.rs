//! The experiment: one TOML file that says everything but the seed.
//!
//! Only `title`, `system`, `[rounds]`, `[stages]`, `[control]` and the source under `[prepare]`
//! are understood here. Every other table belongs to the program that bears its name, which alone
//! knows its keys; what can be changed here is the value of a key that is there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

/// Where the experiments lie, below the root of the workspace.
pub const FOLDER: &str = "configs";

/// An experiment with every value that one run uses.
#[derive(Debug, Clone)]
pub struct Experiment {
    /// Stem of its file: the name under which it is called for and its views are kept.
    pub name: String,
    /// The file it was read from.
    pub path: PathBuf,
    tables: Table,
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
    /// Reads `configs/<word>.toml`, or the file that `word` names when it looks like a path.
    pub fn open(word: &str) -> Result<Self> {
        let named = !word.ends_with(".toml") && !word.contains(['/', '\\']);
        let path = match named {
            true => Path::new(FOLDER).join(format!("{word}.toml")),
            false => PathBuf::from(word),
        };
        let text = match fs::read_to_string(&path) {
            Err(error) if named && error.kind() == std::io::ErrorKind::NotFound => bail!(
                "there is no experiment `{word}`: `{}` is missing; `cargo xtask list` names those \
                 there are",
                path.display()
            ),
            read => read.with_context(|| format!("opening the experiment `{}`", path.display()))?,
        };
        let tables = text
            .parse()
            .with_context(|| format!("the experiment `{}` is not TOML", path.display()))?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, path, tables })
    }

    /// An experiment of this name whose text is no file's.
    pub fn of_text(name: &str, text: &str) -> Result<Self> {
        let tables = text.parse().with_context(|| format!("`{name}` is not TOML"))?;
        Ok(Self { name: name.to_owned(), path: PathBuf::from(name), tables })
    }

    /// Changes one value: `assignment` is `table.key=value`, as TOML writes it; a word may stand
    /// without quotes.
    ///
    /// Fails when the experiment has no such key: a key that no program asks for changes nothing.
    pub fn set(&mut self, assignment: &str) -> Result<()> {
        let change = assignment
            .parse::<Table>()
            .or_else(|error| {
                let (key, word) = assignment.split_once('=').ok_or_else(|| error.clone())?;
                format!("{key} = {}", Value::from(word.trim())).parse().map_err(|_| error)
            })
            .with_context(|| {
                format!("--set {assignment} is not of the form table.key=value, as in TOML")
            })?;
        merge(&mut self.tables, change, "", whole(assignment).as_deref())
            .with_context(|| format!("--set {assignment}, in `{}`", self.path.display()))
    }

    /// The same experiment with the values that `[control]` names, or nothing where it is empty.
    pub fn control(&self) -> Result<Option<Self>> {
        let overrides = match self.tables.get("control") {
            None => return Ok(None),
            Some(Value::Table(table)) if table.is_empty() => return Ok(None),
            Some(Value::Table(table)) => table.clone(),
            Some(_) => bail!("`control` of `{}` is not a table", self.path.display()),
        };
        let mut control = self.clone();
        for (key, value) in overrides {
            let whole = (value.is_table() && key.contains('.')).then_some(key.as_str());
            merge(&mut control.tables, nested(&key, value.clone()), "", whole)
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
            merge(&mut pixels.tables, nested(key, value), "", None).ok()?;
        }
        Some(pixels)
    }

    /// What people call the experiment, key `title`.
    pub fn title(&self) -> Result<String> {
        self.value("title")
    }

    /// The method it runs, key `system`.
    pub fn system(&self) -> Result<String> {
        self.value("system")
    }

    /// The order of the steps.
    pub fn rounds(&self) -> Result<Rounds> {
        self.value("rounds")
    }

    /// The program of each place: a crate of the workspace, or a path to any executable.
    pub fn stages(&self) -> Result<BTreeMap<String, String>> {
        self.value("stages")
    }

    /// Where the pictures come from unless the command line says otherwise.
    pub fn source(&self) -> Result<String> {
        let prepare: Table = self.value("prepare")?;
        let source = prepare.get("source").and_then(Value::as_str).map(str::to_owned);
        source.with_context(|| {
            format!("table `[prepare]` of `{}` has no text `source`", self.path.display())
        })
    }

    /// The table `[name]`, unread.
    pub fn table(&self, name: &str) -> Option<&Value> {
        self.tables.get(name)
    }

    /// Fails at a table that none of these programs reads.
    pub fn refuse_tables_but(&self, known: &[&str]) -> Result<()> {
        for name in self.tables.keys() {
            if !known.contains(&name.as_str()) {
                bail!(
                    "`{name}` of `{}` is read by no stage; known are {}",
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

    fn value<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        let value = self
            .tables
            .get(key)
            .with_context(|| format!("`{}` has no `{key}`", self.path.display()))?;
        value.clone().try_into().map_err(|error: toml::de::Error| {
            anyhow::anyhow!(
                "`{key}` of `{}` is not usable: {}",
                self.path.display(),
                error.to_string().trim()
            )
        })
    }
}

/// `value` under a dotted key, as a table.
fn nested(key: &str, value: Value) -> Table {
    match key.split_once('.') {
        None => Table::from_iter([(key.to_owned(), value)]),
        Some((head, rest)) => {
            Table::from_iter([(head.to_owned(), Value::Table(nested(rest, value)))])
        }
    }
}

/// The dotted path of the table that `path = { … }` writes out, all of its keys.
fn whole(assignment: &str) -> Option<String> {
    let (path, value) = assignment.split_once('=')?;
    let path = path.split('.').map(str::trim).collect::<Vec<_>>().join(".");
    value.trim_start().starts_with('{').then_some(path)
}

/// Puts the values of `change` in the place of those in `tables`, which must have each key.
///
/// The table at the path `whole` is exchanged as it is: another rule of a constraint has other
/// keys. The program that reads it refuses what it does not know.
fn merge(tables: &mut Table, change: Table, prefix: &str, whole: Option<&str>) -> Result<()> {
    for (key, value) in change {
        let known = tables.keys().cloned().collect::<Vec<_>>().join(", ");
        let Some(old) = tables.get_mut(&key) else {
            match prefix {
                "" => bail!("there is no table `[{key}]`; there are {known}"),
                _ => bail!("table `[{prefix}]` has no key `{key}`; its keys are {known}"),
            }
        };
        let path = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        match (old, value) {
            (Value::Table(old), Value::Table(new)) if whole == Some(&path) => *old = new,
            (Value::Table(old), Value::Table(new)) => merge(old, new, &path, whole)?,
            (Value::Table(old), _) => {
                let keys = old.keys().cloned().collect::<Vec<_>>().join(", ");
                bail!("`{path}` is a table; name one of its keys: {keys}")
            }
            (old, new) => *old = of_the_type_of(old, new, &path)?,
        }
    }
    Ok(())
}

/// `new`, where it can stand in the place of `old`; a whole number may be given for a float.
fn of_the_type_of(old: &Value, new: Value, path: &str) -> Result<Value> {
    match (old, new) {
        (Value::Float(_), Value::Integer(number)) => Ok(Value::Float(number as f64)),
        (old, new) if old.same_type(&new) => Ok(new),
        (old, new) => {
            bail!("`{path}` is {old}, {}, and cannot become {new}, {}", kind(old), kind(&new))
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "a text",
        Value::Integer(_) => "a whole number",
        Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a table",
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
        Experiment {
            name: "example".into(),
            path: "example.toml".into(),
            tables: TEXT.parse().expect("TOML"),
        }
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
        none.tables.insert("control".into(), Value::Table(nested("refinement.w", 1.into())));
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
    fn an_unknown_experiment_and_an_unread_table_are_errors() {
        assert!(message(Experiment::open("nowhere")).contains("cargo xtask list"));
        assert!(message(Experiment::open("nowhere.toml")).contains("`nowhere.toml`"));
        let known = ["title", "system", "rounds", "control"];
        assert!(message(example().refuse_tables_but(&known)).contains("`refinement`"));
    }
}
