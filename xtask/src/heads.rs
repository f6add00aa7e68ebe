//! The heads on one frozen embedding, for `assort compare`.
//!
//! A head is a stage that clusters and trains no network. Its experiment is `<data set>-<head>` on an
//! embedding that was learnt on these pictures alone, and `<data set>-<head>-pretrained` on that of a
//! published network: two tables, because that network has seen other pictures. All heads of a table
//! read the result of one and the same step, so that nothing but the head differs. k-means on the rows
//! that a head reads stands above the heads.

use anyhow::{Context, Result, bail};
use stage::{Experiment, Origin, Spec};

use crate::CommandContext;
use crate::compare::{CompareRow, ComparedSystem, ComparedTable, System, backbones};
use crate::plan::{Arm, StepInput};
use crate::programs::table_of;

/// The experiments of the heads on a data set, in the order of their stages.
///
/// - `embedding`: what their names end with.
pub fn experiments(
    session: &CommandContext,
    data_set: &str,
    embedding: &str,
) -> Result<Vec<System>> {
    let known = session.registry.library.names()?;
    let mut found = Vec::new();
    for stage in session.registry.specs().iter().filter(|spec| spec.clusters() && !spec.trains()) {
        let word = format!("{data_set}-{}{embedding}", stage.name);
        if known.contains(&word) {
            found.push(System::open(session, &word)?);
        } else {
            tracing::warn!("there is no experiment `{word}`: skipping {}", stage.name);
        }
    }
    Ok(found)
}

/// The position of the step that clusters, and of the step whose embeddings it reads.
fn head_and_embedding(entry: &ComparedSystem) -> Result<(usize, usize)> {
    let plan = &entry.system.plan;
    let head = plan.scored_by(entry.last_scores(Arm::Main)?);
    let head = head.context("a step that is scored has pseudo-labels")?;
    let step = &plan.steps[head];
    let role = step.place.inputs.iter().find(|role| role.origin == Origin::Embeddings);
    let read = step.inputs.iter().find_map(|(name, input)| match input {
        StepInput::Step(position) if role.is_some_and(|role| role.name == *name) => Some(*position),
        _ => None,
    });
    Ok((head, read.with_context(|| format!("`{}` reads no embeddings", entry.name()))?))
}

/// The position of the step whose embeddings the head reads.
pub fn embedding(entry: &ComparedSystem) -> Result<usize> {
    head_and_embedding(entry).map(|(_, embedding)| embedding)
}

/// Fails unless all heads read the result of one step, for every seed.
pub fn require_one_embedding(entries: &[ComparedSystem]) -> Result<()> {
    let first = &entries[0];
    let its_step = embedding(first)?;
    for other in &entries[1..] {
        let step = embedding(other)?;
        let pairs = first.runs.iter().zip(&other.runs);
        if pairs.into_iter().any(|(one, two)| one.folder(its_step) != two.folder(step)) {
            let tables = differing(first.system, other.system, its_step.max(step));
            bail!(
                "`{}` and `{}` do not share one embedding: {}; heads are compared on the same \
                 embedding, so both must extend the same one",
                first.name(),
                other.name(),
                match &tables[..] {
                    [] => "their steps up to it differ".to_owned(),
                    tables => format!("they differ in `[{}]`", tables.join("]`, `[")),
                }
            )
        }
    }
    Ok(())
}

/// The tables of the programs up to the step at `last` in which two experiments differ.
fn differing<'a>(one: &'a System, other: &'a System, last: usize) -> Vec<&'a str> {
    let steps = |system: &'a System| system.plan.steps.iter().take(last + 1);
    let mut tables: Vec<&str> =
        steps(one).chain(steps(other)).map(|step| table_of(&step.program)).collect();
    tables.push("data");
    tables.sort_unstable();
    tables.dedup();
    tables.retain(|table| one.experiment.value(table) != other.experiment.value(table));
    tables
}

/// The rows: each different result of k-means, then the heads. Seconds and memory are the head's.
pub fn rows(entries: &[ComparedSystem]) -> Result<Vec<CompareRow>> {
    let (mut baselines, mut rows): (Vec<CompareRow>, Vec<CompareRow>) = (Vec::new(), Vec::new());
    for entry in entries {
        let (scores, (head, _)) = (entry.last_scores(Arm::Main)?, head_and_embedding(entry)?);
        let name = entry.system.experiment.system()?;
        let k_means = entry.row(name.clone(), scores, |metrics| metrics.kmeans, &[])?;
        match baselines.iter_mut().find(|known| are_equal(known, &k_means)) {
            Some(known) => known.system += &format!(", {name}"),
            None => baselines.push(k_means),
        }
        rows.push(entry.row(name, scores, |metrics| metrics.head, &[head])?);
    }
    for row in &mut baselines {
        row.system.insert_str(0, "k-means beside ");
        row.seconds = None;
    }
    Ok(baselines.into_iter().chain(rows).collect())
}

/// Whether two rows have the same scores. Sums over renumbered clusters differ in their last bits.
fn are_equal(one: &CompareRow, other: &CompareRow) -> bool {
    one.scores.iter().zip(&other.scores).all(|pair| match pair {
        (Some(one), Some(other)) => (one.mean - other.mean).abs() < 1e-9,
        (one, other) => one.is_none() && other.is_none(),
    })
}

/// What a reader of the table must know.
pub fn note(table: ComparedTable, experiment: &Experiment, stages: &[Spec]) -> String {
    const ONE: &str = "All rows are on one embedding; seconds and memory are the head's.";
    if table == ComparedTable::Heads {
        return format!("{ONE} It was learnt on these pictures alone.");
    }
    let backbones = backbones(experiment, stages);
    let name = backbones.iter().find_map(|backbone| backbone.as_str()).unwrap_or("published");
    format!(
        "{ONE} It is that of the network `{name}`, which others trained on other pictures. Published \
         networks have mostly seen ImageNet, and so the pictures of Imagenette, ImageNet-10, \
         ImageNet-Dogs, Tiny-ImageNet and STL-10: do not set these rows beside systems that see \
         these pictures alone."
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::RunPlan;

    #[test]
    fn the_note_names_the_network_and_what_it_has_seen() {
        let trained = Spec {
            name: "pretrained",
            algorithm: 1,
            inputs: &[],
            outputs: &[stage::Output::Network],
            ranks: stage::Ranks::One,
        };
        let text = "[pretrained]\nbackbone = 'dinov2-small'";
        let experiment = Experiment::of_text("x", text).expect("TOML");
        let of = |table| note(table, &experiment, &[trained]);
        assert!(of(ComparedTable::Pretrained).contains("`dinov2-small`"));
        assert!(of(ComparedTable::Pretrained).contains("ImageNet"));
        assert!(of(ComparedTable::Heads).contains("these pictures alone"));
        assert!(!of(ComparedTable::Heads).contains("ImageNet"));
    }

    #[test]
    fn the_tables_that_differ_are_named() {
        let system = |text: &str| {
            let experiment = Experiment::of_text("x", text).expect("TOML");
            System { plan: RunPlan { arms: vec![], steps: vec![] }, experiment }
        };
        let one = system("[data]\nclusters = 3");
        assert!(differing(&one, &one, 0).is_empty());
        assert_eq!(differing(&one, &system("[data]\nclusters = 4"), 0), ["data"]);
    }
}
