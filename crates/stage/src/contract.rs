//! What a stage is: a name, a table of the experiment, what it reads and writes, a check, a run.

use std::fmt::Debug;

use anyhow::Result;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Interrupt, Job};

/// A step of the loop from pictures to clusters: files in, files out.
///
/// A stage is a unit struct that implements this trait. One line of a registry of
/// [`Program`](crate::Program)s makes it a program and a place of experiments.
pub trait Stage {
    /// What an orchestrator must know of the stage.
    const SPEC: Spec;

    /// The stage's table of the experiment, `[<name>]`. Every field is set there: there are no
    /// defaults in code.
    type Config: DeserializeOwned + Serialize + Debug;

    /// Whether the results depend on the pictures. If `false`, one result serves all pictures: the key
    /// leaves them out, and [`Stage::run`] gets an empty path; only [`Stage::check`] gets the real one.
    const DEPENDS_ON_IMAGES: bool = true;

    /// Checks the table and the inputs before anything runs, and returns the cost of the run.
    ///
    /// Writes nothing and decodes no picture. Outputs of steps that have not run yet are absent;
    /// only existing inputs are checked.
    fn check(config: &Self::Config, job: &Job) -> Result<Effort>;

    /// Identifies what the stage reads from outside the run, such as the commit and the digest of a
    /// published network; never a branch, which moves. It is part of the key of cached results.
    ///
    /// # Errors
    ///
    /// It does not exist, or the network is needed to identify it and cannot be reached.
    fn identity(_config: &Self::Config, _interrupt: &Interrupt) -> Result<Option<String>> {
        Ok(None)
    }

    /// Reads the inputs of `job` and writes its outputs to `job.out`. Resumes an unfinished run
    /// there, or starts it again.
    ///
    /// # Errors
    ///
    /// An input is missing, damaged or foreign; or one of the errors that have an exit
    /// [`Status`](crate::Status): [`Interrupted`](crate::Interrupted),
    /// [`Diverged`](crate::Diverged).
    fn run(config: &Self::Config, job: &Job) -> Result<()>;
}

/// What an orchestrator must know of a stage to plan, start and cache its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// Name of the program, of its table, and of the place that it fills by default.
    pub name: &'static str,
    /// Version of the results. Raise it when outputs change for the same table, so that cached
    /// results are invalidated.
    pub algorithm: u32,
    /// Outputs of earlier steps that the stage reads, besides the pictures.
    pub inputs: &'static [Role],
    /// What it writes that later stages read.
    pub outputs: &'static [Output],
    /// How many processes can share a step of it.
    pub ranks: Ranks,
}

/// How many processes, connected by MPI, can share a step of a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ranks {
    /// Only one.
    One,
    /// As many as its table has `run.batch-groups`, or fewer: a training.
    BatchGroups,
    /// Any power of two.
    Any,
}

impl Spec {
    /// True for a stage that writes a network.
    pub fn trains(&self) -> bool {
        self.outputs.contains(&Output::Network)
    }

    /// True for a stage that writes pseudo-labels; its clusters can be the result of a run.
    pub fn clusters(&self) -> bool {
        self.outputs.contains(&Output::PseudoLabels)
    }

    /// True for a stage whose results may depend on the number of clusters: one that writes clusters
    /// or reads them.
    ///
    /// The other stages are given 0 as [`DataTable::clusters`](crate::DataTable), so that one
    /// training serves every number of clusters.
    pub fn depends_on_clusters(&self) -> bool {
        let reads = |role: &Role| {
            matches!(
                role.origin,
                Origin::PseudoLabels | Origin::EarlierPseudoLabels | Origin::Labels
            )
        };
        self.clusters() || self.inputs.iter().any(reads)
    }

    /// True for a system in one stage, which trains and clusters.
    pub fn is_one_phase(&self) -> bool {
        self.trains() && self.clusters()
    }
}

/// An input of a stage: the folder given as `--in <name>=DIR`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Role {
    /// What the folder is to the stage.
    pub name: &'static str,
    /// Which earlier step wrote it.
    pub origin: Origin,
}

impl Role {
    /// The input `name`, from `origin`.
    pub const fn new(name: &'static str, origin: Origin) -> Self {
        Self { name, origin }
    }

    /// The optional input of pretraining and of every system in one phase: a backbone to start from.
    pub const BACKBONE: Self = Self::new("backbone", Origin::Backbone);
}

/// Where an input comes from, among the steps before its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The last step that trained a network.
    Network,
    /// The same, for its backbone alone. Optional.
    Backbone,
    /// The last step that wrote embeddings.
    Embeddings,
    /// The last step that wrote pseudo-labels.
    PseudoLabels,
    /// The same place, one round before. Optional.
    PreviousRound,
    /// The step that wrote pseudo-labels before the last one did. Optional.
    EarlierPseudoLabels,
    /// The last step that trained a clustering network together with the network of the pictures.
    /// Optional.
    RefinedHead,
    /// The same step of the run that this one replaces, which saw other pictures or had other values.
    /// Optional, and not part of a step's key: results must not depend on it, but for the numbers of
    /// clusters, which have no meaning.
    EarlierRun,
    /// The prepared folder with the ground truth.
    Labels,
}

impl Origin {
    /// What the folder is, for a person who runs a stage alone.
    pub const fn description(self) -> &'static str {
        match self {
            Self::Network => "output of a stage that trained a network, or of pretrained",
            Self::Backbone => "the same; its backbone is what this stage starts from",
            Self::Embeddings => "output of embed",
            Self::PseudoLabels => "output of a stage that clustered",
            Self::PreviousRound => "this stage's output of the round before",
            Self::EarlierPseudoLabels => "output of the clustering before the last one",
            Self::RefinedHead => "output of a stage that trained the head further",
            Self::EarlierRun => "this stage's output on earlier pictures",
            Self::Labels => "prepared folder with the ground truth",
        }
    }

    /// True if a step can run without this input, such as `PreviousRound` in round 0.
    pub const fn is_optional(self) -> bool {
        matches!(
            self,
            Self::Backbone
                | Self::PreviousRound
                | Self::EarlierPseudoLabels
                | Self::RefinedHead
                | Self::EarlierRun
        )
    }
}

/// What a stage writes that later stages read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// `network.safetensors` and `backbone.safetensors`, with `config.json`.
    Network,
    /// `embeddings.safetensors`.
    Embeddings,
    /// `pseudo-labels.safetensors` and `head.safetensors`.
    PseudoLabels,
    /// `head.safetensors` alone: a clustering network that was trained further, with its clusters in the
    /// order of the pseudo-labels that were read.
    RefinedHead,
    /// `metrics.json`.
    Scores,
}

/// What a step costs, as its stage's check declares it, in multiply-adds of its networks' products,
/// forward and backward as they run. A comparison holds systems to equal efforts.
///
/// Losses, centres and k-means are not counted; a stage without a network has no effort.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Effort {
    /// Multiply-adds in networks whose plan is in the stage's table.
    multiply_adds: f64,
    /// Pictures passed to the embedding of a network that an earlier step writes; the stage does not
    /// know its plan.
    embedded_pictures: f64,
    /// The same, to the projection.
    projected_pictures: f64,
    /// The same, forward and backward.
    learnt_pictures: f64,
    /// Cost of a picture in the network that the stage writes; `None` if an earlier step's network
    /// is trained further.
    #[serde(skip_serializing_if = "Option::is_none")]
    embedding_cost: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    projection_cost: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    learning_cost: Option<f64>,
}

/// The multiply-adds of one picture in a network.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PictureCost {
    /// From picture to embedding.
    pub embedding: f64,
    /// From picture to projection.
    pub projection: f64,
    /// Forward and backward through everything that learns.
    pub learning: f64,
}

impl Effort {
    /// For a stage without a network, or one whose pictures do not exist yet.
    pub const NONE: Self = Self {
        multiply_adds: 0.,
        embedded_pictures: 0.,
        projected_pictures: 0.,
        learnt_pictures: 0.,
        embedding_cost: None,
        projection_cost: None,
        learning_cost: None,
    };

    /// For a stage that writes a new network, in which a picture costs `network`.
    pub const fn of_multiply_adds(multiply_adds: f64, network: PictureCost) -> Self {
        Self {
            multiply_adds,
            embedding_cost: Some(network.embedding),
            projection_cost: Some(network.projection),
            learning_cost: Some(network.learning),
            ..Self::NONE
        }
    }

    /// For a stage that passes pictures through the network of an earlier step.
    ///
    /// - `embedded`, `projected`, `learnt`: numbers of pictures, see [`PictureCost`].
    pub const fn of_pictures(embedded: f64, projected: f64, learnt: f64) -> Self {
        Self {
            embedded_pictures: embedded,
            projected_pictures: projected,
            learnt_pictures: learnt,
            ..Self::NONE
        }
    }

    /// Cost of a picture in the network that the stage writes.
    pub fn network(&self) -> Option<PictureCost> {
        Some(PictureCost {
            embedding: self.embedding_cost?,
            projection: self.projection_cost?,
            learning: self.learning_cost?,
        })
    }

    /// The multiply-adds of the step; `None` if it needs the cost of a network that is not known.
    ///
    /// - `read`: the cost of a picture in the network that the step reads.
    pub fn multiply_adds(&self, read: Option<PictureCost>) -> Option<f64> {
        if self.embedded_pictures + self.projected_pictures + self.learnt_pictures == 0. {
            return Some(self.multiply_adds);
        }
        let PictureCost { embedding, projection, learning } = read?;
        Some(
            self.multiply_adds
                + self.embedded_pictures * embedding
                + self.projected_pictures * projection
                + self.learnt_pictures * learning,
        )
    }

    /// Reads the effort from what a program printed under `--check`; `None` for a foreign program
    /// that declares none.
    pub fn of_check(printed: &str) -> Option<Self> {
        let mut table: toml::Table = printed.parse().ok()?;
        // The table of the stage follows.
        table.retain(|_, value| !value.is_table());
        table.try_into().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_that_trains_and_clusters_is_one_phase() {
        let outputs: &[(&'static [Output], [bool; 3])] = &[
            (&[], [false, false, false]),
            (&[Output::Network], [true, false, false]),
            (&[Output::PseudoLabels], [false, true, false]),
            (&[Output::Network, Output::PseudoLabels], [true, true, true]),
        ];
        for &(outputs, expected) in outputs {
            let spec =
                Spec { name: "example", algorithm: 1, inputs: &[], outputs, ranks: Ranks::One };
            assert_eq!([spec.trains(), spec.clusters(), spec.is_one_phase()], expected);
        }
    }

    #[test]
    fn a_stage_that_neither_reads_nor_writes_clusters_does_not_depend_on_their_number() {
        let spec = |inputs, outputs| Spec {
            name: "example",
            algorithm: 1,
            inputs,
            outputs,
            ranks: Ranks::One,
        };
        const NETWORK: &[Role] = &[Role::new("network", Origin::Network)];
        const LABELS: &[Role] = &[Role::new("labels", Origin::PseudoLabels)];
        assert!(!spec(NETWORK, &[Output::Embeddings]).depends_on_clusters());
        assert!(spec(LABELS, &[Output::Network]).depends_on_clusters());
        assert!(spec(NETWORK, &[Output::PseudoLabels]).depends_on_clusters());
    }

    #[test]
    fn the_effort_is_read_from_a_check_s_output() {
        let network = PictureCost { embedding: 2., projection: 3., learning: 9. };
        for effort in [Effort::of_multiply_adds(1.5e19, network), Effort::of_pictures(1., 2., 3.)] {
            let printed = toml::to_string(&effort).expect("TOML");
            let printed = format!("{printed}\n[embed]\nviews = 8\n");
            assert_eq!(Effort::of_check(&printed), Some(effort));
        }
        assert_eq!(Effort::of_multiply_adds(7., network).multiply_adds(None), Some(7.));
        assert_eq!(Effort::of_multiply_adds(7., network).network(), Some(network));
        let passes = Effort::of_pictures(100., 10., 1.);
        assert_eq!(passes.multiply_adds(Some(network)), Some(200. + 30. + 9.));
        assert_eq!((passes.multiply_adds(None), passes.network()), (None, None));
        assert_eq!(Effort::of_check("[clusters]\nheads = 8\n"), None);
        assert_eq!(Effort::of_check("all is well"), None);
    }
}
