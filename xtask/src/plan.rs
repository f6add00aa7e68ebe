//! The plan: which steps make up a run, in which order, and what each is given.
//!
//! A *place* is what a step is for (`embed`); the experiment says which program fills it. What a
//! step is given depends on its place alone, see [`PLACES`].

use std::fmt;

use anyhow::{Context, Result, bail, ensure};

use crate::experiment::Experiment;

/// What a step is given, by role.
enum Origin {
    /// The last step that trained the network.
    Network,
    /// The last embeddings.
    Embeddings,
    /// The last clustering.
    Clustering,
    /// The same place, one round before; absent in its first round.
    OneRoundBefore,
    /// The clustering before the last; absent in the first round.
    ClusteringBefore,
    /// The prepared folder with the ground truth.
    Labels,
}

/// The places, and what the program in each is given.
const PLACES: [(&str, &[(&str, Origin)]); 5] = [
    ("pretraining", &[]),
    ("embed", &[("network", Origin::Network)]),
    ("clustering", &[("embeddings", Origin::Embeddings), ("previous", Origin::OneRoundBefore)]),
    (
        "prototype-refinement",
        &[
            ("network", Origin::Network),
            ("pseudo-labels", Origin::Clustering),
            ("previous", Origin::OneRoundBefore),
        ],
    ),
    (
        "metrics",
        &[
            ("pseudo-labels", Origin::Clustering),
            ("labels", Origin::Labels),
            ("previous", Origin::ClusteringBefore),
        ],
    ),
];

/// The places whose programs train the network.
const TRAINING: [&str; 2] = ["pretraining", "prototype-refinement"];

/// Which row of the results a step works for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arm {
    /// The experiment itself.
    Main,
    /// k-means on the pixels.
    Pixels,
    /// The same effort without the part under test, see `[control]`.
    Control,
}

impl fmt::Display for Arm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Main => "experiment",
            Self::Pixels => "pixels",
            Self::Control => "control",
        })
    }
}

/// Where an input comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// An earlier step of the plan, by its position.
    Step(usize),
    /// The prepared folder.
    Labels,
}

/// One start of one program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The row it works for.
    pub arm: Arm,
    /// What it is for.
    pub place: String,
    /// Round, from 0.
    pub round: usize,
    /// How many rounds follow round 0; 0 for a step outside the loop, which must not depend on it.
    pub rounds: usize,
    /// The crate or executable that fills the place.
    pub program: String,
    /// Inputs by role.
    pub inputs: Vec<(&'static str, Input)>,
}

impl Step {
    /// `0-pretraining`, with the row in front where it is not the experiment itself.
    pub fn name(&self) -> String {
        match self.arm {
            Arm::Main => format!("{}-{}", self.round, self.place),
            arm => format!("{arm}/{}-{}", self.round, self.place),
        }
    }
}

/// The experiment of each arm, and all steps in the order in which they run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The experiment of each arm.
    pub arms: Vec<(Arm, Experiment)>,
    /// The steps; an input lies before the step it is given to.
    pub steps: Vec<Step>,
}

impl Plan {
    /// The steps of an experiment with its baseline and its control.
    pub fn of(experiment: &Experiment) -> Result<Self> {
        let mut arms = vec![(Arm::Main, experiment.clone())];
        arms.extend(experiment.pixels().map(|pixels| (Arm::Pixels, pixels)));
        arms.extend(experiment.control()?.map(|control| (Arm::Control, control)));
        let mut steps = Vec::new();
        for (arm, experiment) in &arms {
            let added = match arm {
                Arm::Pixels => pixel_steps(&mut steps),
                Arm::Main | Arm::Control => round_steps(&mut steps, *arm, experiment),
            };
            added.with_context(|| format!("`{}`", experiment.path.display()))?;
        }
        let plan = Self { arms, steps };
        plan.refuse_unread_tables(experiment)?;
        Ok(plan)
    }

    /// The experiment that `arm` runs.
    pub fn experiment(&self, arm: Arm) -> &Experiment {
        let found = self.arms.iter().find(|(other, _)| *other == arm);
        &found.expect("a step's arm is one of the plan's").1
    }

    /// The programs to build or find, each once, in order of first use.
    pub fn programs(&self) -> Vec<&str> {
        let mut programs = Vec::new();
        for step in &self.steps {
            if !programs.contains(&step.program.as_str()) {
                programs.push(&step.program);
            }
        }
        programs
    }

    /// Positions of the steps of `arm` at `place`, in order of rounds.
    pub fn at(&self, arm: Arm, place: &str) -> impl Iterator<Item = usize> {
        let here = move |step: &Step| step.arm == arm && step.place == place;
        (0..self.steps.len()).filter(move |&position| here(&self.steps[position]))
    }

    fn refuse_unread_tables(&self, experiment: &Experiment) -> Result<()> {
        let mut known = vec!["title", "system", "data", "prepare", "rounds", "stages", "control"];
        known.extend(PLACES.iter().map(|(place, _)| *place));
        known.extend(self.steps.iter().map(|step| table_of(&step.program)));
        known.dedup();
        experiment.refuse_tables_but(&known)
    }
}

/// The table a program reads: the one that bears its name.
pub fn table_of(program: &str) -> &str {
    let file = program.rsplit(['/', '\\']).next().unwrap_or(program);
    file.split_once('.').map_or(file, |(stem, _)| stem)
}

/// Adds the steps of all rounds, with `metrics` after every clustering.
fn round_steps(steps: &mut Vec<Step>, arm: Arm, experiment: &Experiment) -> Result<()> {
    let order = experiment.rounds()?;
    let stages = experiment.stages()?;
    let loops = |place: &str| {
        order.then.iter().any(|other| other == place)
            || place == "metrics" && order.then.iter().any(|other| other == "clustering")
    };
    for round in 0..=order.rounds {
        for place in if round == 0 { &order.first } else { &order.then } {
            let metrics = (place == "clustering").then_some("metrics");
            for place in [place.as_str()].into_iter().chain(metrics) {
                let inputs = inputs(steps, arm, place, round)?;
                let program = stages.get(place).with_context(|| {
                    format!("table `[stages]` names no program for the place `{place}`")
                })?;
                let rounds = if loops(place) { order.rounds } else { 0 };
                let (place, program) = (place.to_owned(), program.clone());
                steps.push(Step { arm, place, round, rounds, program, inputs });
            }
        }
    }
    let last = order.then.last().filter(|_| order.rounds > 0).or(order.first.last());
    ensure!(
        last.is_some_and(|place| place == "clustering"),
        "the last place of a round must be `clustering`: its assignments are the result"
    );
    Ok(())
}

/// Adds k-means on the pixels: always by this workspace's programs, whatever fills the places.
fn pixel_steps(steps: &mut Vec<Step>) -> Result<()> {
    for place in ["embed", "clustering", "metrics"] {
        let inputs = match place {
            "embed" => Vec::new(),
            place => inputs(steps, Arm::Pixels, place, 0)?,
        };
        let (place, program) = (place.to_owned(), place.to_owned());
        steps.push(Step { arm: Arm::Pixels, place, round: 0, rounds: 0, program, inputs });
    }
    Ok(())
}

/// What a step at `place` is given, out of the steps that run before it.
fn inputs(
    steps: &[Step],
    arm: Arm,
    place: &str,
    round: usize,
) -> Result<Vec<(&'static str, Input)>> {
    let Some((_, roles)) = PLACES.iter().find(|(known, _)| *known == place) else {
        let known: Vec<_> = PLACES.iter().map(|(place, _)| *place).collect();
        bail!("there is no place `{place}`; there are {}", known.join(", "))
    };
    let last = |places: &[&str], skip: usize| {
        let fits = |step: &Step| step.arm == arm && places.contains(&step.place.as_str());
        (0..steps.len()).rev().filter(|&position| fits(&steps[position])).nth(skip)
    };
    let mut inputs = Vec::new();
    for (role, origin) in *roles {
        let (found, optional) = match origin {
            Origin::Network => (last(&TRAINING, 0), false),
            Origin::Embeddings => (last(&["embed"], 0), false),
            Origin::Clustering => (last(&["clustering"], 0), false),
            Origin::OneRoundBefore => (last(&[place], 0), true),
            Origin::ClusteringBefore => (last(&["clustering"], 1), true),
            Origin::Labels => {
                inputs.push((*role, Input::Labels));
                continue;
            }
        };
        match found {
            Some(position) => inputs.push((*role, Input::Step(position))),
            None if optional => {}
            None => bail!(
                "`{place}` of round {round} needs a {role}, but no place before it in `[rounds]` \
                 writes one"
            ),
        }
    }
    Ok(inputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        title = "Example"
        system = "PLDC"
        [rounds]
        rounds = 2
        first = ["pretraining", "embed", "clustering"]
        then = ["prototype-refinement", "embed", "clustering"]
        [stages]
        pretraining = "pretraining"
        embed = "embed"
        clustering = "other/clusters.py"
        prototype-refinement = "prototype-refinement"
        metrics = "metrics"
        [control]
        "prototype-refinement.noise" = 0.0
        [prototype-refinement]
        noise = 1.0
        [embed]
        pixels = false
        [clustering]
        heads = 2
        neighbours = 3
        kmeans-metric = "spherical"
    "#;

    fn experiment(text: &str) -> Experiment {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("example.toml");
        std::fs::write(&path, text).expect("written");
        Experiment::open(path.to_str().expect("UTF-8")).expect("TOML")
    }

    fn names(plan: &Plan, arm: Arm) -> Vec<String> {
        plan.steps.iter().filter(|step| step.arm == arm).map(Step::name).collect()
    }

    /// `role=name` of the inputs of the step `name`.
    fn given(plan: &Plan, name: &str) -> Vec<String> {
        let step = plan.steps.iter().find(|step| step.name() == name).expect(name);
        let given = |(role, input): &(&str, Input)| match input {
            Input::Step(position) => format!("{role}={}", plan.steps[*position].name()),
            Input::Labels => (*role).to_owned(),
        };
        step.inputs.iter().map(given).collect()
    }

    #[test]
    fn steps_follow_the_rounds_with_metrics_after_every_clustering() {
        let plan = Plan::of(&experiment(TEXT)).expect("sound");
        let main = [
            ["0-pretraining", "0-embed", "0-clustering", "0-metrics"],
            ["1-prototype-refinement", "1-embed", "1-clustering", "1-metrics"],
            ["2-prototype-refinement", "2-embed", "2-clustering", "2-metrics"],
        ]
        .concat();
        assert_eq!(names(&plan, Arm::Main), main);
        let control: Vec<_> = main.iter().map(|name| format!("control/{name}")).collect();
        assert_eq!(names(&plan, Arm::Control), control);
        let pixels = ["pixels/0-embed", "pixels/0-clustering", "pixels/0-metrics"];
        assert_eq!(names(&plan, Arm::Pixels), pixels);
    }

    #[test]
    fn roles_follow_the_place() {
        let plan = Plan::of(&experiment(TEXT)).expect("sound");
        assert!(given(&plan, "0-pretraining").is_empty());
        assert_eq!(given(&plan, "0-embed"), ["network=0-pretraining"]);
        assert_eq!(given(&plan, "2-embed"), ["network=2-prototype-refinement"]);
        assert_eq!(given(&plan, "0-clustering"), ["embeddings=0-embed"]);
        assert_eq!(given(&plan, "2-clustering"), ["embeddings=2-embed", "previous=1-clustering"]);
        assert_eq!(
            given(&plan, "1-prototype-refinement"),
            ["network=0-pretraining", "pseudo-labels=0-clustering"]
        );
        assert_eq!(
            given(&plan, "2-prototype-refinement"),
            [
                "network=1-prototype-refinement",
                "pseudo-labels=1-clustering",
                "previous=1-prototype-refinement"
            ]
        );
        assert_eq!(given(&plan, "0-metrics"), ["pseudo-labels=0-clustering", "labels"]);
        assert_eq!(
            given(&plan, "2-metrics"),
            ["pseudo-labels=2-clustering", "labels", "previous=1-clustering"]
        );
        assert_eq!(
            given(&plan, "control/1-prototype-refinement"),
            ["network=control/0-pretraining", "pseudo-labels=control/0-clustering"]
        );
        assert!(given(&plan, "pixels/0-embed").is_empty());
        assert_eq!(given(&plan, "pixels/0-clustering"), ["embeddings=pixels/0-embed"]);
    }

    #[test]
    fn a_step_outside_the_loop_is_told_of_no_rounds() {
        let plan = Plan::of(&experiment(TEXT)).expect("sound");
        for step in &plan.steps {
            let outside = step.place == "pretraining" || step.arm == Arm::Pixels;
            assert_eq!(step.rounds, if outside { 0 } else { 2 }, "{}", step.name());
        }
    }

    #[test]
    fn programs_are_named_once_and_the_baseline_uses_its_own() {
        let plan = Plan::of(&experiment(TEXT)).expect("sound");
        let programs = [
            "pretraining",
            "embed",
            "other/clusters.py",
            "metrics",
            "prototype-refinement",
            "clustering",
        ];
        assert_eq!(plan.programs(), programs);
        assert_eq!(table_of("other/clusters.py"), "clusters");
        assert_eq!(table_of("prototype-refinement"), "prototype-refinement");
    }

    #[test]
    fn an_order_that_cannot_run_is_refused() {
        let refused = |from: &str, to: &str| {
            let changed = TEXT.replace(from, to);
            assert_ne!(changed, TEXT);
            format!("{:#}", Plan::of(&experiment(&changed)).expect_err("refused"))
        };
        let then = r#"then = ["prototype-refinement", "embed", "clustering"]"#;
        assert!(refused(then, r#"then = ["embed"]"#).contains("must be `clustering`"));
        assert!(refused(then, r#"then = ["cluster"]"#).contains("no place `cluster`"));
        let first = r#"first = ["pretraining", "embed", "clustering"]"#;
        assert!(refused(first, r#"first = ["embed", "clustering"]"#).contains("needs a network"));
        assert!(refused("metrics = \"metrics\"", "").contains("`[stages]` names no program"));
        assert!(refused("[clustering]", "[clusterings]").contains("`clusterings`"));
    }
}
