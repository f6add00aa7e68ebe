//! Changes of tables: an experiment's own values over its bases, and `--set`.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result, bail};
use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use crate::shared::is_reference;

/// A change of existing tables, parsed from TOML.
///
/// A table under a header `[a.b]` merges key by key into the old one. An inline table `{ … }` is a
/// value and replaces the whole old one, because a constraint of another rule has other keys.
#[derive(Debug, Clone)]
pub enum TableChange {
    /// Replaces the old value.
    Value(Value),
    /// Changes the entries of a table.
    Table(BTreeMap<String, TableChange>),
}

/// Which keys a change may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// Any; a new one is added.
    New,
    /// Existing keys: no program would read another one.
    Known,
}

impl TableChange {
    /// Parses a TOML document.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        let values: Table = text.parse()?;
        let places = DeTable::parse(text)?;
        Ok(Self::of_table(values, places.get_ref(), text))
    }

    fn of_table(values: Table, places: &DeTable, text: &str) -> Self {
        let places: BTreeMap<&str, _> =
            places.iter().map(|(key, value)| (key.get_ref().as_ref(), value)).collect();
        let change = |(key, value): (String, Value)| {
            let change = match (value, places.get(key.as_str())) {
                (Value::Table(table), Some(place)) => match place.get_ref() {
                    DeValue::Table(inner) if !text[place.span()].starts_with('{') => {
                        Self::of_table(table, inner, text)
                    }
                    _ => Self::Value(Value::Table(table)),
                },
                (value, _) => Self::Value(value),
            };
            (key, change)
        };
        Self::Table(values.into_iter().map(change).collect())
    }

    /// A change of the value at a dotted path.
    pub fn at(path: &str, value: Value) -> Self {
        path.rsplit('.').fold(Self::Value(value), |change, key| {
            Self::Table(BTreeMap::from([(key.to_owned(), change)]))
        })
    }

    /// Applies the change to `tables`.
    ///
    /// # Errors
    ///
    /// A value would change its type, or a key is new although [`Keys::Known`] is given. The message
    /// names the key.
    pub fn apply(self, tables: &mut Table, keys: Keys) -> Result<()> {
        match self {
            Self::Table(changes) => apply_all(changes, tables, keys, ""),
            Self::Value(value) => bail!("{value} is not a table"),
        }
    }

    /// The paths of the changed values, as lists of keys.
    pub fn paths(&self) -> Vec<Vec<&str>> {
        let Self::Table(changes) = self else { return vec![vec![]] };
        let mut paths = Vec::new();
        for (key, change) in changes {
            paths.extend(change.paths().into_iter().map(|path| [&[key.as_str()], &*path].concat()));
        }
        paths
    }

    fn into_value(self) -> Value {
        match self {
            Self::Value(value) => value,
            Self::Table(changes) => Value::Table(
                changes.into_iter().map(|(key, change)| (key, change.into_value())).collect(),
            ),
        }
    }
}

impl From<Value> for TableChange {
    /// A table merges; what it holds replaces.
    fn from(value: Value) -> Self {
        match value {
            Value::Table(table) => {
                Self::Table(table.into_iter().map(|(key, value)| (key, value.into())).collect())
            }
            value => Self::Value(value),
        }
    }
}

fn apply_all(
    changes: BTreeMap<String, TableChange>,
    tables: &mut Table,
    keys: Keys,
    prefix: &str,
) -> Result<()> {
    for (key, change) in changes {
        let path = Path { prefix, key: &key };
        match (tables.get_mut(&key), change) {
            (None, change) if keys == Keys::New => {
                tables.insert(key, change.into_value());
            }
            (None, _) => {
                let known = tables.keys().cloned().collect::<Vec<_>>().join(", ");
                match prefix {
                    "" => bail!("there is no table `[{key}]`; there are {known}"),
                    _ => bail!("table `[{prefix}]` has no key `{key}`; its keys are {known}"),
                }
            }
            // Only the shared value has a type.
            (Some(old), TableChange::Value(new)) if is_reference(old) || is_reference(&new) => {
                *old = new;
            }
            (Some(Value::Table(old)), TableChange::Table(changes)) => {
                apply_all(changes, old, keys, &path.to_string())?;
            }
            (Some(old @ Value::Table(_)), TableChange::Value(new @ Value::Table(_))) => *old = new,
            (Some(Value::Table(old)), TableChange::Value(_)) => {
                let known = old.keys().cloned().collect::<Vec<_>>().join(", ");
                bail!("`{path}` is a table; name one of its keys: {known}")
            }
            (Some(old), change) => *old = of_the_type_of(old, change.into_value(), &path)?,
        }
    }
    Ok(())
}

/// A dotted path.
struct Path<'a> {
    prefix: &'a str,
    key: &'a str,
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix {
            "" => f.write_str(self.key),
            prefix => write!(f, "{prefix}.{}", self.key),
        }
    }
}

/// Returns `new` if it can replace `old`; a whole number becomes a float where one is expected.
fn of_the_type_of(old: &Value, new: Value, path: &Path) -> Result<Value> {
    match (old, new) {
        (Value::Float(_), Value::Integer(number)) => Ok(Value::Float(number as f64)),
        (old, new) if old.same_type(&new) => Ok(new),
        (old, new) => {
            bail!("`{path}` is {old}, {}, and cannot become {new}, {}", kind(old), kind(&new))
        }
    }
}

/// Names the type of a value, with an article.
pub fn kind(value: &Value) -> &'static str {
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

/// Parses `table.key=value`, where the value is TOML; a single word needs no quotes.
pub fn assignment(text: &str) -> Result<TableChange> {
    TableChange::parse(text)
        .or_else(|error| {
            let (key, word) = text.split_once('=').ok_or_else(|| error.clone())?;
            TableChange::parse(&format!("{key} = {}", Value::from(word.trim()))).map_err(|_| error)
        })
        .context("it is not of the form table.key=value, as in TOML")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        text.parse().expect("TOML")
    }

    fn changed(keys: Keys, old: &str, change: &str) -> Result<Table> {
        let mut tables = table(old);
        TableChange::parse(change).expect("TOML").apply(&mut tables, keys)?;
        Ok(tables)
    }

    const OLD: &str = "title = 'a'\n[secu]\nepochs = 3\nrate = 0.5\nheads = [10, 20]\n\
                       constraint = { rule = 'size', lower = 0.9 }\n[secu.input]\nwidth = 8\n\
                       height = 9";

    #[test]
    fn tables_under_headers_merge_and_every_value_replaces() {
        let change = "title = 'b'\n[secu]\nrate = 2\nheads = [5]\ninput.width = 6\n[new]\nx = 1";
        let merged = changed(Keys::New, OLD, change).expect("sound");
        let expected = "title = 'b'\n[secu]\nepochs = 3\nrate = 2.0\nheads = [5]\n\
                        constraint = { rule = 'size', lower = 0.9 }\n[secu.input]\nwidth = 6\n\
                        height = 9\n[new]\nx = 1";
        assert_eq!(merged, table(expected));
    }

    #[test]
    fn an_inline_table_replaces_the_whole_and_a_header_merges_into_it() {
        let replaced = "[secu]\nconstraint = { rule = 'entropy', weight = 242.0 }";
        let replaced = changed(Keys::New, OLD, replaced).expect("sound");
        let expected = table("rule = 'entropy'\nweight = 242.0");
        assert_eq!(replaced["secu"]["constraint"], Value::Table(expected));
        for merging in ["[secu.constraint]\nlower = 0.8", "secu.constraint.lower = 0.8"] {
            let merged = changed(Keys::Known, OLD, merging).expect("sound");
            let expected = table("rule = 'size'\nlower = 0.8");
            assert_eq!(merged["secu"]["constraint"], Value::Table(expected), "{merging}");
        }
        let emptied = changed(Keys::New, OLD, "secu = {}").expect("sound");
        assert_eq!(emptied["secu"], Value::Table(Table::new()));
    }

    #[test]
    fn a_reference_replaces_any_value_and_any_value_replaces_a_reference() {
        let references = "[secu]\nrate = { from = 'rate' }\n[secu.input]\nfrom = 'input'";
        let merged = changed(Keys::New, OLD, references).expect("sound");
        assert!(is_reference(&merged["secu"]["rate"]));
        let beside = "from = 'input'\nwidth = 8\nheight = 9";
        assert_eq!(merged["secu"]["input"], Value::Table(table(beside)));
        let back = changed(Keys::New, &merged.to_string(), "secu.rate = 2").expect("sound");
        assert_eq!(back["secu"]["rate"], Value::Integer(2));
    }

    #[test]
    fn a_wrong_type_and_an_unknown_key_are_errors_that_name_the_path() {
        let message = |keys, change| changed(keys, OLD, change).expect_err("refused").to_string();
        let wrong = message(Keys::New, "[secu]\nepochs = 'many'");
        assert!(wrong.contains("`secu.epochs` is 3, a whole number"), "{wrong}");
        assert!(message(Keys::New, "[secu.rate]\nx = 1").contains("`secu.rate` is 0.5, a number"));
        assert!(message(Keys::New, "secu = 3").contains("name one of its keys"));
        assert!(message(Keys::Known, "[secu]\nepoch = 3").contains("no key `epoch`"));
        assert!(message(Keys::Known, "[sec]\nepoch = 3").contains("no table `[sec]`"));
    }
}
