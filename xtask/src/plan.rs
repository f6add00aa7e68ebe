//! The plan: the steps of a run in order, with their inputs.
//!
//! A *place* is the purpose of a step (`embed`) and has the name of a stage; the experiment names
//! the program that fills it. The [`Spec`] of that stage decides the step's inputs.

use std::fmt;

use anyhow::{Context, Result, bail};
use stage::{Experiment, Origin, Output, Spec};

use crate::programs::table_of;

/// The row of the results that a step belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arm {
    /// The experiment itself.
    Main,
    /// k-means on the pixels.
    Pixels,
    /// The same effort without the part under test; see `[control]`.
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

/// The origin of an input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepInput {
    /// An earlier step of the plan, by position.
    Step(usize),
    /// The prepared folder.
    Labels,
}

/// One start of one program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The row that it belongs to.
    pub arm: Arm,
    /// The stage whose place it fills.
    pub place: Spec,
    /// Round, from 0.
    pub round: usize,
    /// How many rounds follow round 0; 0 for a step outside the loop, which must not depend on it.
    pub rounds: usize,
    /// The crate or executable that fills the place.
    pub program: String,
    /// Inputs by role.
    pub inputs: Vec<(&'static str, StepInput)>,
}

impl Step {
    /// `0-pretraining`; prefixed by the row if it does not belong to the experiment itself.
    pub fn name(&self) -> String {
        match self.arm {
            Arm::Main => format!("{}-{}", self.round, self.place.name),
            arm => format!("{arm}/{}-{}", self.round, self.place.name),
        }
    }
}

/// The experiment of each arm, and all steps in order.
#[derive(Debug, Clone)]
pub struct RunPlan {
    /// The experiment of each arm.
    pub arms: Vec<(Arm, Experiment)>,
    /// The steps. The inputs of a step are before it.
    pub steps: Vec<Step>,
}

impl RunPlan {
    /// Plans the steps of an experiment with its baseline and its control.
    ///
    /// - `stages`: all stages that can fill a place.
    pub fn of(experiment: &Experiment, stages: &[Spec]) -> Result<Self> {
        let mut arms = vec![(Arm::Main, experiment.clone())];
        arms.extend(experiment.pixels().map(|pixels| (Arm::Pixels, pixels)));
        arms.extend(experiment.control()?.map(|control| (Arm::Control, control)));
        let mut steps = PlanBuilder { stages, steps: Vec::new() };
        for (arm, experiment) in &arms {
            let added = match arm {
                Arm::Pixels => steps.add_pixels(),
                Arm::Main | Arm::Control => steps.add_rounds(*arm, experiment),
            };
            added.with_context(|| format!("`{}`", experiment.path.display()))?;
        }
        let plan = Self { arms, steps: steps.steps };
        plan.refuse_unread_tables(experiment, stages)?;
        Ok(plan)
    }

    /// The experiment that `arm` runs.
    pub fn experiment(&self, arm: Arm) -> &Experiment {
        let found = self.arms.iter().find(|(other, _)| *other == arm);
        &found.expect("a step's arm is one of the plan's").1
    }

    /// The distinct programs, in order of first use.
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
        self.of_arm(arm).filter(move |&position| self.steps[position].place.name == place)
    }

    /// Positions of the steps of `arm`, in order.
    pub fn of_arm(&self, arm: Arm) -> impl Iterator<Item = usize> {
        (0..self.steps.len()).filter(move |&position| self.steps[position].arm == arm)
    }

    /// Positions of the steps of `arm` that write scores, in order of rounds.
    pub fn scores(&self, arm: Arm) -> impl Iterator<Item = usize> {
        self.of_arm(arm).filter(|&position| is_scorer(&self.steps[position].place))
    }

    /// The position of the step whose assignments the step at `scores` scores.
    pub fn scored_by(&self, scores: usize) -> Option<usize> {
        let step = &self.steps[scores];
        let role = step.place.inputs.iter().find(|role| role.origin == Origin::PseudoLabels)?;
        step.inputs.iter().find_map(|(other, input)| match input {
            StepInput::Step(position) if *other == role.name => Some(*position),
            _ => None,
        })
    }

    /// Whether the step clusters the embeddings of another step, and does not train itself.
    pub fn clusters_alone(&self, position: usize) -> bool {
        let place = &self.steps[position].place;
        place.clusters() && !place.trains()
    }

    fn refuse_unread_tables(&self, experiment: &Experiment, stages: &[Spec]) -> Result<()> {
        let mut known = vec!["title", "system", "data", "prepare", "rounds", "stages", "control"];
        known.extend(stages.iter().map(|place| place.name));
        known.extend(self.steps.iter().map(|step| table_of(&step.program)));
        known.sort_unstable();
        known.dedup();
        experiment.refuse_tables_but(&known)
    }
}

/// Whether a stage scores: its steps follow every step that clusters.
fn is_scorer(place: &Spec) -> bool {
    place.outputs.contains(&Output::Scores)
}

/// Builds the list of steps.
struct PlanBuilder<'a> {
    stages: &'a [Spec],
    steps: Vec<Step>,
}

impl PlanBuilder<'_> {
    /// Adds the steps of all rounds, with a scoring step after every step that clusters.
    fn add_rounds(&mut self, arm: Arm, experiment: &Experiment) -> Result<()> {
        let order = experiment.rounds()?;
        let programs = experiment.stages()?;
        let (first, then) = (self.places(&order.first)?, self.places(&order.then)?);
        for round in 0..=order.rounds {
            for place in if round == 0 { &first } else { &then } {
                let program = programs.get(place.name).with_context(|| {
                    format!("table `[stages]` names no program for the place `{}`", place.name)
                })?;
                let loops = then.iter().any(|other| other.name == place.name);
                let rounds = if loops { order.rounds } else { 0 };
                self.add(arm, place, (round, rounds), program)?;
            }
        }
        let last = if order.rounds > 0 { &then } else { &first };
        if !last.iter().any(is_scorer) {
            let able: Vec<_> =
                self.stages.iter().filter(|p| p.clusters()).map(|place| place.name).collect();
            bail!("a place of the last round must be one that clusters: {}", able.join(", "))
        }
        Ok(())
    }

    /// The places of a round by name, with the scoring place after each that clusters.
    fn places(&self, names: &[String]) -> Result<Vec<Spec>> {
        let mut places = Vec::new();
        for name in names {
            let place = self.place(name)?;
            places.push(place);
            if place.clusters() {
                let scorer = self.stages.iter().copied().find(is_scorer);
                places.push(scorer.context("no stage writes scores")?);
            }
        }
        Ok(places)
    }

    fn place(&self, name: &str) -> Result<Spec> {
        let found = self.stages.iter().copied().find(|place| place.name == name);
        found.with_context(|| {
            let known: Vec<_> = self.stages.iter().map(|place| place.name).collect();
            format!("there is no place `{name}`; there are {}", known.join(", "))
        })
    }

    /// Adds k-means on the pixels, always by this program's stages.
    fn add_pixels(&mut self) -> Result<()> {
        let embed = self.place("embed")?;
        let program = embed.name.to_owned();
        let inputs = Vec::new();
        let step = Step { arm: Arm::Pixels, place: embed, round: 0, rounds: 0, program, inputs };
        self.steps.push(step);
        for place in self.places(&["clustering".to_owned()])? {
            self.add(Arm::Pixels, &place, (0, 0), place.name)?;
        }
        Ok(())
    }

    /// Adds a step, with its inputs from the steps before it.
    fn add(
        &mut self,
        arm: Arm,
        place: &Spec,
        (round, rounds): (usize, usize),
        program: &str,
    ) -> Result<()> {
        let last = |fits: &dyn Fn(&Spec) -> bool, skip: usize| {
            let fits = |step: &Step| step.arm == arm && fits(&step.place);
            (0..self.steps.len()).rev().filter(|&position| fits(&self.steps[position])).nth(skip)
        };
        let mut inputs = Vec::new();
        for input in place.inputs {
            let found = match input.origin {
                Origin::Network | Origin::Backbone => last(&Spec::trains, 0),
                Origin::Embeddings => last(&|place| place.outputs.contains(&Output::Embeddings), 0),
                Origin::PseudoLabels => last(&Spec::clusters, 0),
                Origin::PreviousRound => last(&|other| other.name == place.name, 0),
                Origin::EarlierPseudoLabels => last(&Spec::clusters, 1),
                Origin::RefinedHead => {
                    last(&|place| place.outputs.contains(&Output::RefinedHead), 0)
                }
                Origin::EarlierRun => None, // Known when the run starts.
                Origin::Labels => {
                    inputs.push((input.name, StepInput::Labels));
                    continue;
                }
            };
            match found {
                Some(position) => inputs.push((input.name, StepInput::Step(position))),
                None if input.origin.is_optional() => {}
                None => bail!(
                    "`{}` of round {round} needs the input {}, but no place before it in \
                     `[rounds]` writes it",
                    place.name,
                    input.name
                ),
            }
        }
        let (place, program) = (*place, program.to_owned());
        self.steps.push(Step { arm, place, round, rounds, program, inputs });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use stage::{Ranks, Role};

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

    /// The plan of an experiment, with the stages of `assort`.
    fn planned(text: &str) -> Result<RunPlan> {
        RunPlan::of(&Experiment::of_text("example", text).expect("TOML"), &STAGES)
    }

    const fn stage(
        name: &'static str,
        inputs: &'static [Role],
        outputs: &'static [Output],
    ) -> Spec {
        Spec { name, algorithm: 1, inputs, outputs, ranks: Ranks::One }
    }

    const STAGES: [Spec; 7] = [
        stage("pretraining", &[], &[Output::Network]),
        stage("embed", &[Role::new("network", Origin::Network)], &[Output::Embeddings]),
        stage(
            "clustering",
            &[
                Role::new("embeddings", Origin::Embeddings),
                Role::new("previous", Origin::PreviousRound),
                Role::new("refined-head", Origin::RefinedHead),
            ],
            &[Output::PseudoLabels],
        ),
        stage(
            "neighbour-refinement",
            &[
                Role::new("network", Origin::Network),
                Role::new("pseudo-labels", Origin::PseudoLabels),
            ],
            &[Output::Network, Output::RefinedHead],
        ),
        stage(
            "prototype-refinement",
            &[
                Role::new("network", Origin::Network),
                Role::new("pseudo-labels", Origin::PseudoLabels),
                Role::new("previous", Origin::PreviousRound),
            ],
            &[Output::Network],
        ),
        stage(
            "metrics",
            &[
                Role::new("pseudo-labels", Origin::PseudoLabels),
                Role::new("labels", Origin::Labels),
                Role::new("previous", Origin::EarlierPseudoLabels),
            ],
            &[Output::Scores],
        ),
        stage("propos", &[Role::BACKBONE], &[Output::Network, Output::PseudoLabels]),
    ];

    fn names(plan: &RunPlan, arm: Arm) -> Vec<String> {
        plan.steps.iter().filter(|step| step.arm == arm).map(Step::name).collect()
    }

    /// `role=name` of the inputs of the step `name`.
    fn given(plan: &RunPlan, name: &str) -> Vec<String> {
        let step = plan.steps.iter().find(|step| step.name() == name).expect(name);
        let given = |(role, input): &(&str, StepInput)| match input {
            StepInput::Step(position) => format!("{role}={}", plan.steps[*position].name()),
            StepInput::Labels => (*role).to_owned(),
        };
        step.inputs.iter().map(given).collect()
    }

    #[test]
    fn steps_follow_the_rounds_with_metrics_after_every_clustering() {
        let plan = planned(TEXT).expect("sound");
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
    fn clustering_reads_the_head_of_the_last_refinement_that_trained_one() {
        let text = TEXT.replace("prototype-refinement", "neighbour-refinement");
        let plan = planned(&text).expect("sound");
        assert_eq!(given(&plan, "0-clustering"), ["embeddings=0-embed"]);
        assert_eq!(
            given(&plan, "2-clustering"),
            ["embeddings=2-embed", "previous=1-clustering", "refined-head=2-neighbour-refinement"]
        );
        assert_eq!(
            given(&plan, "control/1-clustering")[2],
            "refined-head=control/1-neighbour-refinement"
        );
    }

    #[test]
    fn roles_follow_the_place() {
        let plan = planned(TEXT).expect("sound");
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
        let plan = planned(ONE_PHASE).expect("sound");
        assert_eq!(names(&plan, Arm::Main), ["0-propos", "0-metrics"]);
        assert_eq!(names(&plan, Arm::Control), ["control/0-propos", "control/0-metrics"]);
        assert!(names(&plan, Arm::Pixels).is_empty());
        assert!(given(&plan, "0-propos").is_empty());
        assert_eq!(given(&plan, "0-metrics"), ["pseudo-labels=0-propos", "labels"]);
        assert_eq!(plan.scored_by(1), Some(0));
        assert!(!plan.clusters_alone(0));
        assert_eq!(plan.programs(), ["propos", "metrics"]);

        let pldc = planned(TEXT).expect("sound");
        assert_eq!(pldc.scored_by(3), Some(2));
        assert!(pldc.clusters_alone(2) && !pldc.clusters_alone(0) && !pldc.clusters_alone(3));
    }

    #[test]
    fn a_system_of_one_phase_may_start_from_a_pretrained_backbone() {
        let first = r#"first = ["pretraining", "propos"]"#;
        let text = ONE_PHASE.replace(r#"first = ["propos"]"#, first);
        let plan = planned(&text).expect("sound");
        assert_eq!(names(&plan, Arm::Main), ["0-pretraining", "0-propos", "0-metrics"]);
        assert_eq!(given(&plan, "0-propos"), ["backbone=0-pretraining"]);
        assert_eq!(given(&plan, "control/0-metrics"), ["pseudo-labels=control/0-propos", "labels"]);
    }

    #[test]
    fn a_step_outside_the_loop_has_no_rounds() {
        let plan = planned(TEXT).expect("sound");
        for step in &plan.steps {
            let outside = step.place.name == "pretraining" || step.arm == Arm::Pixels;
            assert_eq!(step.rounds, if outside { 0 } else { 2 }, "{}", step.name());
        }
    }

    #[test]
    fn programs_are_listed_once_and_the_baseline_uses_its_own() {
        let plan = planned(TEXT).expect("sound");
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
            format!("{:#}", planned(&changed).expect_err("refused"))
        };
        let then = r#"then = ["prototype-refinement", "embed", "clustering"]"#;
        assert!(refused(then, r#"then = ["embed"]"#).contains("clusters: clustering, propos"));
        assert!(refused(then, r#"then = ["cluster"]"#).contains("no place `cluster`"));
        let first = r#"first = ["pretraining", "embed", "clustering"]"#;
        assert!(
            refused(first, r#"first = ["embed", "clustering"]"#)
                .contains("needs the input network")
        );
        assert!(refused("metrics = \"metrics\"", "").contains("`[stages]` names no program"));
        assert!(refused("[clustering]", "[clusterings]").contains("`clusterings`"));
    }
}
