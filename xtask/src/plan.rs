//! The plan: which steps make up a run, in which order, and what each is given.
//!
//! A *place* is what a step is for (`embed`); the experiment says which program fills it. What a
//! step is given depends on its place alone, see [`PLACES`].

use std::fmt;

use anyhow::{Context, Result, bail};

use stage::Experiment;

/// Where a step's input comes from, among the steps before it.
#[derive(Debug, Clone, Copy)]
enum Origin {
    /// The last step that trained the network.
    Network,
    /// The same, for its backbone alone; absent where nothing trained one.
    Backbone,
    /// The last embeddings.
    Embeddings,
    /// The last pseudo-labels.
    PseudoLabels,
    /// The same place, one round before; absent in its first round.
    OneRoundBefore,
    /// The pseudo-labels before the last; absent in the first round.
    PseudoLabelsBefore,
    /// The prepared folder with the ground truth.
    Labels,
}

/// What a step can be for.
#[derive(Debug)]
struct Place {
    name: &'static str,
    /// What its program is given, by role.
    given: &'static [(&'static str, Origin)],
    /// Whether its program writes a network.
    trains: bool,
    /// Whether its program writes pseudo-labels: `metrics` then follows it, and a run may end here.
    clusters: bool,
}

/// Every place there is. The last four are whole systems, which train and cluster in one stage.
const PLACES: [Place; 9] = [
    Place { name: "pretraining", given: &[], trains: true, clusters: false },
    Place { name: "embed", given: &[("network", Origin::Network)], trains: false, clusters: false },
    Place {
        name: "clustering",
        given: &[("embeddings", Origin::Embeddings), ("previous", Origin::OneRoundBefore)],
        trains: false,
        clusters: true,
    },
    Place {
        name: "prototype-refinement",
        given: &[
            ("network", Origin::Network),
            ("pseudo-labels", Origin::PseudoLabels),
            ("previous", Origin::OneRoundBefore),
        ],
        trains: true,
        clusters: false,
    },
    Place {
        name: METRICS,
        given: &[
            ("pseudo-labels", Origin::PseudoLabels),
            ("labels", Origin::Labels),
            ("previous", Origin::PseudoLabelsBefore),
        ],
        trains: false,
        clusters: false,
    },
    one_phase("propos"),
    one_phase("secu"),
    one_phase("imc-swav"),
    one_phase("icbpl"),
];

/// A system that goes from pictures to pseudo-labels by itself. It may start from a backbone.
const fn one_phase(name: &'static str) -> Place {
    Place { name, given: &[("backbone", Origin::Backbone)], trains: true, clusters: true }
}

/// Places that are whole systems, which train and cluster in one stage.
pub fn systems() -> impl Iterator<Item = &'static str> {
    PLACES.iter().filter(|place| place.trains && place.clusters).map(|place| place.name)
}

/// Places whose programs train a network.
pub fn trained_places() -> impl Iterator<Item = &'static str> {
    PLACES.iter().filter(|place| place.trains).map(|place| place.name)
}

/// The place whose program scores what the last one that clusters found.
const METRICS: &str = "metrics";

impl Place {
    fn named(name: &str) -> Result<&'static Self> {
        PLACES.iter().find(|place| place.name == name).with_context(|| {
            let known: Vec<_> = PLACES.iter().map(|place| place.name).collect();
            format!("there is no place `{name}`; there are {}", known.join(", "))
        })
    }
}

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

    /// The step of `arm` whose assignments `metrics` at this position scores.
    pub fn scored_by(&self, metrics: usize) -> Option<usize> {
        let mut inputs = self.steps[metrics].inputs.iter();
        inputs.find_map(|(role, input)| match input {
            Input::Step(position) if *role == "pseudo-labels" => Some(*position),
            _ => None,
        })
    }

    /// True where the step found its clusters in the embeddings of another that trained.
    pub fn clusters_alone(&self, position: usize) -> bool {
        Place::named(&self.steps[position].place).is_ok_and(|place| place.clusters && !place.trains)
    }

    fn refuse_unread_tables(&self, experiment: &Experiment) -> Result<()> {
        let mut known = vec!["title", "system", "data", "prepare", "rounds", "stages", "control"];
        known.extend(PLACES.iter().map(|place| place.name));
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

/// Adds the steps of all rounds, with `metrics` after every step that clusters.
fn round_steps(steps: &mut Vec<Step>, arm: Arm, experiment: &Experiment) -> Result<()> {
    let order = experiment.rounds()?;
    let stages = experiment.stages()?;
    let places = |names: &[String]| -> Result<Vec<&Place>> {
        let scored = |name: &String| {
            let place = Place::named(name)?;
            Ok([Some(place), place.clusters.then(|| Place::named(METRICS)).transpose()?])
        };
        let places = names.iter().map(scored).collect::<Result<Vec<_>>>()?;
        Ok(places.into_iter().flatten().flatten().collect())
    };
    let (first, then) = (places(&order.first)?, places(&order.then)?);
    for round in 0..=order.rounds {
        for place in if round == 0 { &first } else { &then } {
            let inputs = inputs(steps, arm, place, round)?;
            let program = stages.get(place.name).with_context(|| {
                format!("table `[stages]` names no program for the place `{}`", place.name)
            })?;
            let loops = then.iter().any(|other| other.name == place.name);
            let rounds = if loops { order.rounds } else { 0 };
            let (place, program) = (place.name.to_owned(), program.clone());
            steps.push(Step { arm, place, round, rounds, program, inputs });
        }
    }
    let last = if order.rounds > 0 { &then } else { &first };
    if last.last().is_none_or(|place| place.name != METRICS) {
        let able: Vec<_> = PLACES.iter().filter(|p| p.clusters).map(|place| place.name).collect();
        bail!(
            "the last place of a round must be one whose assignments are the result: {}",
            able.join(", ")
        )
    }
    Ok(())
}

/// Adds k-means on the pixels: always by this workspace's programs, whatever fills the places.
fn pixel_steps(steps: &mut Vec<Step>) -> Result<()> {
    for name in ["embed", "clustering", METRICS] {
        let inputs = match name {
            "embed" => Vec::new(),
            name => inputs(steps, Arm::Pixels, Place::named(name)?, 0)?,
        };
        let (place, program) = (name.to_owned(), name.to_owned());
        steps.push(Step { arm: Arm::Pixels, place, round: 0, rounds: 0, program, inputs });
    }
    Ok(())
}

/// What a step at `place` is given, out of the steps that run before it.
fn inputs(
    steps: &[Step],
    arm: Arm,
    place: &Place,
    round: usize,
) -> Result<Vec<(&'static str, Input)>> {
    let last = |fits: &dyn Fn(&Place) -> bool, skip: usize| {
        let fits = |step: &Step| step.arm == arm && Place::named(&step.place).is_ok_and(fits);
        (0..steps.len()).rev().filter(|&position| fits(&steps[position])).nth(skip)
    };
    let mut inputs = Vec::new();
    for (role, origin) in place.given {
        let (found, optional) = match origin {
            Origin::Network => (last(&|place| place.trains, 0), false),
            Origin::Backbone => (last(&|place| place.trains, 0), true),
            Origin::Embeddings => (last(&|place| place.name == "embed", 0), false),
            Origin::PseudoLabels => (last(&|place| place.clusters, 0), false),
            Origin::OneRoundBefore => (last(&|other| other.name == place.name, 0), true),
            Origin::PseudoLabelsBefore => (last(&|place| place.clusters, 1), true),
            Origin::Labels => {
                inputs.push((*role, Input::Labels));
                continue;
            }
        };
        match found {
            Some(position) => inputs.push((*role, Input::Step(position))),
            None if optional => {}
            None => bail!(
                "`{}` of round {round} needs a {role}, but no place before it in `[rounds]` writes \
                 one",
                place.name
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
        Experiment::read(&path).expect("TOML")
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

    /// A system that is one stage, which trains and clusters.
    const ONE_PHASE: &str = r#"
        [rounds]
        rounds = 0
        first = ["propos"]
        then = []
        [stages]
        pretraining = "pretraining"
        propos = "propos"
        metrics = "metrics"
        [control]
        "propos.noise" = 0.0
        [propos]
        noise = 1.0
    "#;

    #[test]
    fn a_system_of_one_phase_is_one_step_and_its_score() {
        let plan = Plan::of(&experiment(ONE_PHASE)).expect("sound");
        assert_eq!(names(&plan, Arm::Main), ["0-propos", "0-metrics"]);
        assert_eq!(names(&plan, Arm::Control), ["control/0-propos", "control/0-metrics"]);
        assert!(names(&plan, Arm::Pixels).is_empty());
        assert!(given(&plan, "0-propos").is_empty());
        assert_eq!(given(&plan, "0-metrics"), ["pseudo-labels=0-propos", "labels"]);
        assert_eq!(plan.scored_by(1), Some(0));
        assert!(!plan.clusters_alone(0));
        assert_eq!(plan.programs(), ["propos", "metrics"]);

        let pldc = Plan::of(&experiment(TEXT)).expect("sound");
        assert_eq!(pldc.scored_by(3), Some(2));
        assert!(pldc.clusters_alone(2) && !pldc.clusters_alone(0) && !pldc.clusters_alone(3));
    }

    #[test]
    fn a_system_of_one_phase_may_start_from_a_pretrained_backbone() {
        let first = r#"first = ["pretraining", "propos"]"#;
        let text = ONE_PHASE.replace(r#"first = ["propos"]"#, first);
        let plan = Plan::of(&experiment(&text)).expect("sound");
        assert_eq!(names(&plan, Arm::Main), ["0-pretraining", "0-propos", "0-metrics"]);
        assert_eq!(given(&plan, "0-propos"), ["backbone=0-pretraining"]);
        assert_eq!(given(&plan, "control/0-metrics"), ["pseudo-labels=control/0-propos", "labels"]);
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
        assert!(refused(then, r#"then = ["embed"]"#).contains("result: clustering, propos"));
        assert!(refused(then, r#"then = ["cluster"]"#).contains("no place `cluster`"));
        let first = r#"first = ["pretraining", "embed", "clustering"]"#;
        assert!(refused(first, r#"first = ["embed", "clustering"]"#).contains("needs a network"));
        assert!(refused("metrics = \"metrics\"", "").contains("`[stages]` names no program"));
        assert!(refused("[clustering]", "[clusterings]").contains("`clusterings`"));
    }
}
