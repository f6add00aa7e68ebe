//! Values that several tables of an experiment share.
//!
//! The table `[shared]` holds them. In other tables, `{ from = "views" }` is replaced by the value of
//! `[shared]` with this name or dotted path; keys beside `from` replace those of the shared table.
//! Shared values may refer to each other. A resolved experiment has neither `[shared]` nor `from`.

use anyhow::{Context, Result, bail, ensure};
use toml::{Table, Value};

use crate::change::{Keys, TableChange, kind};

/// The table of the shared values.
pub const SHARED: &str = "shared";

/// The key that names a shared value.
const FROM: &str = "from";

/// True for a table that takes a shared value.
pub fn is_reference(value: &Value) -> bool {
    value.as_table().is_some_and(|table| table.contains_key(FROM))
}

/// Copies shared values to where tables take them, and removes `[shared]`.
///
/// # Errors
///
/// A name has no shared value, or its value takes itself.
pub fn resolve(mut tables: Table) -> Result<Table> {
    let shared = match tables.remove(SHARED) {
        None => Table::new(),
        Some(Value::Table(shared)) => shared,
        Some(other) => bail!("`{SHARED}` is {}, not a table", kind(&other)),
    };
    resolve_table(tables, &shared, &[])
}

/// Fails if a value that `change` gives in `[shared]` makes no difference to the resolved experiment.
///
/// - `tables`: the experiment with this change, not resolved.
pub fn refuse_unused(change: &TableChange, tables: &Table) -> Result<()> {
    let resolved = resolve(tables.clone())?;
    for path in change.paths() {
        let mut without = tables.clone();
        let shared = path.first() == Some(&SHARED);
        if shared && remove(&mut without, &path) && resolve(without).is_ok_and(|t| t == resolved) {
            bail!(
                "`{}` changes nothing: no table of this experiment takes it, or a key beside \
                 `from` replaces it",
                path.join(".")
            )
        }
    }
    Ok(())
}

/// Removes the value at this path, if there is one.
fn remove(tables: &mut Table, path: &[&str]) -> bool {
    match path {
        [] => false,
        [key] => tables.remove(*key).is_some(),
        [key, below @ ..] => match tables.get_mut(*key) {
            Some(Value::Table(table)) => remove(table, below),
            _ => false,
        },
    }
}

fn resolve_table(table: Table, shared: &Table, above: &[&str]) -> Result<Table> {
    let resolve = |(key, value)| Ok((key, resolve_value(value, shared, above)?));
    table.into_iter().map(resolve).collect()
}

/// - `above`: the paths whose values are being resolved, each taken by the one before it.
fn resolve_value(value: Value, shared: &Table, above: &[&str]) -> Result<Value> {
    let mut table = match value {
        Value::Table(table) => table,
        Value::Array(values) => {
            let values = values.into_iter().map(|value| resolve_value(value, shared, above));
            return Ok(Value::Array(values.collect::<Result<_>>()?));
        }
        value => return Ok(value),
    };
    let from = table.remove(FROM);
    let beside = resolve_table(table, shared, above)?;
    let path = match from {
        None => return Ok(Value::Table(beside)),
        Some(Value::String(path)) => path,
        Some(other) => bail!("`{FROM}` is {}; it must name a shared value", kind(&other)),
    };
    let above = [above, &[path.as_str()]].concat();
    ensure!(
        !above[..above.len() - 1].contains(&path.as_str()),
        "shared values refer to each other in a circle: {}",
        above.join(" -> ")
    );
    match resolve_value(look_up(&path, shared)?, shared, &above)? {
        Value::Table(mut taken) => {
            TableChange::from(Value::Table(beside))
                .apply(&mut taken, Keys::New)
                .with_context(|| format!("beside `{FROM} = \"{path}\"`"))?;
            Ok(Value::Table(taken))
        }
        taken if beside.is_empty() => Ok(taken),
        taken => bail!(
            "`[{SHARED}]` has {} at `{path}`, so that no key can stand beside `{FROM} = \
             \"{path}\"`",
            kind(&taken)
        ),
    }
}

/// The shared value at a dotted path.
fn look_up(path: &str, shared: &Table) -> Result<Value> {
    let mut keys = path.split('.');
    let first = keys.next().and_then(|key| shared.get(key));
    let found = keys.try_fold(first, |value, key| value.map(|value| value.get(key)));
    found.flatten().cloned().with_context(|| {
        let known = shared.keys().cloned().collect::<Vec<_>>().join(", ");
        format!("`{FROM} = \"{path}\"`: `[{SHARED}]` has no `{path}`; it has {known}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        text.parse().expect("TOML")
    }

    fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
        format!("{:#}", result.expect_err("an error"))
    }

    const SHARED_VALUES: &str = "[shared]\nprecision = 'bf16'\nmild = { from = 'views' }\n\
                                 [shared.views]\noperations = [{ flip = 0.5 }, { grey = 0.2 }]\n\
                                 [shared.backbone]\nwidth = 64\nrate = 0.5\ndepth = '18'\n";

    fn resolved(text: &str) -> Result<Table> {
        resolve(table(&format!("{text}\n{SHARED_VALUES}")))
    }

    #[test]
    fn a_reference_stands_for_a_value_of_any_kind_wherever_it_is() {
        let text = "[embed]\nprecision = { from = 'precision' }\nviews = { from = 'mild' }\n\
                    widths = [{ from = 'backbone.width' }, 8]\n\
                    [small]\noperations = { from = 'views.operations' }";
        let want = "[embed]\nprecision = 'bf16'\nwidths = [64, 8]\n\
                    views.operations = [{ flip = 0.5 }, { grey = 0.2 }]\n\
                    [small]\noperations = [{ flip = 0.5 }, { grey = 0.2 }]";
        assert_eq!(resolved(text).expect("sound"), table(want));
    }

    #[test]
    fn keys_beside_a_reference_go_over_those_taken() {
        let text = "[propos.backbone]\nfrom = 'backbone'\ndepth = '34'\nrate = 2\nstem = '3x3'";
        let want = "[propos.backbone]\nwidth = 64\nrate = 2.0\ndepth = '34'\nstem = '3x3'";
        assert_eq!(resolved(text).expect("sound"), table(want));
        let wrong = message(resolved("[x]\nfrom = 'backbone'\nwidth = 'wide'"));
        assert!(wrong.contains("beside `from = \"backbone\"`: `width` is 64"), "{wrong}");
        let wrong = message(resolved("[x]\nfrom = 'precision'\nwidth = 3"));
        assert!(wrong.contains("has a text at `precision`"), "{wrong}");
    }

    #[test]
    fn a_missing_value_a_circle_and_a_wrong_type_are_errors() {
        let missing = message(resolved("[x]\ny = { from = 'veiws' }"));
        assert!(
            missing.contains("no `veiws`; it has backbone, mild, precision, views"),
            "{missing}"
        );
        assert!(message(resolved("x = { from = 'views.o.p' }")).contains("no `views.o.p`"));
        assert!(message(resolved("x = { from = 3 }")).contains("`from` is a whole number"));
        let circle = "[x]\nfrom = 'a'\n[shared.a]\nb = { from = 'c' }\n[shared.c]\nfrom = 'a'";
        assert!(message(resolve(table(circle))).contains("a -> c -> a"));
        assert!(message(resolve(table("shared = 3"))).contains("not a table"));
    }

    #[test]
    fn a_shared_value_that_changes_nothing_is_refused() {
        let experiment = "[embed]\nviews = { from = 'mild' }\n\
                          backbone = { from = 'backbone', depth = '34' }";
        let tables = table(&format!("{experiment}\n{SHARED_VALUES}"));
        let refused =
            |change: &str| refuse_unused(&TableChange::parse(change).expect("TOML"), &tables);
        refused("shared.views.operations = []\n[embed]\nviews = 3").expect("taken through `mild`");
        refused("[shared.backbone]\nwidth = 64").expect("taken");
        for unused in ["shared.precision = 'f32'", "[shared.backbone]\ndepth = '10'"] {
            assert!(message(refused(unused)).contains("changes nothing"), "{unused}");
        }
    }
}
