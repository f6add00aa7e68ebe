//! Stage: draws the last layers of a network towards random weights, so that training leaves where the
//! clusters of the round before have led it.
//!
//! `θ ← α θ + (1 − α) φ`, with a fresh random draw `φ`: the soft reset of BRB (Miklautz et al. 2025,
//! ICLR), for the last stage of the backbone, the projector's hidden layer and the predictor. The target
//! network becomes a copy of the online network. Nothing is trained here: a refinement follows, which
//! should start without momentum and with a warm-up of its own.
//!
//! BRB resets before clustering losses; before BYOL, and with these layers, it is our reading, and so are
//! biases, for which `φ` is 0.
//!
//! - Reads `network` (the last training stage).
//! - Writes `network.safetensors`, `backbone.safetensors`, `config.json`.
//!
//! Start at the `run` of [`SoftReset`]; the draw is in [`reset`].

use anyhow::Result;
use backbone::{Configuration, Segment, backbone_file, network_file};
use layers::{EntryKind, Network, TensorEntry};
use rand::RngExt;
use serde::{Deserialize, Serialize};
use stage::{Effort, Job, Origin, Output, Ranks, Role, Spec, Stage};
use training::check;

/// The table `[soft-reset]`: the shares α of the weights that are kept. With 1 a part stays as it is, to
/// the bit; where all three are 1, the target network does too.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Of the last stage of the backbone: convolutions and batch norms.
    pub backbone_share: f64,
    /// Of the projector's hidden layer, with its batch norm.
    pub projector_share: f64,
    /// Of the predictor.
    pub predictor_share: f64,
}

/// The stage: see the documentation of the crate.
pub struct SoftReset;

impl Stage for SoftReset {
    const SPEC: Spec = Spec {
        name: "soft-reset",
        algorithm: 1,
        inputs: &[Role::new("network", Origin::Network)],
        outputs: &[Output::Network],
        ranks: Ranks::One,
    };
    type Config = Config;

    fn check(config: &Config, job: &Job) -> Result<Effort> {
        for (key, value) in [
            ("backbone-share", config.backbone_share),
            ("projector-share", config.projector_share),
            ("predictor-share", config.predictor_share),
        ] {
            check::within(job.name, key, value, 0. ..=1.)?;
        }
        Ok(Effort::NONE)
    }

    fn run(config: &Config, job: &Job) -> Result<()> {
        job.clear_log()?;
        let folder = job.input("network")?;
        let configuration = Configuration::read(folder)?;
        let file = network_file::open(folder)?;
        let load = |name: &str, plan: Network| -> Result<Segment> {
            let mut segment = Segment::empty(plan);
            network_file::load(&file, name, &mut segment)?;
            Ok(segment)
        };
        let mut backbone = load("online.backbone", configuration.backbone_plan()?)?;
        let mut projector = load("online.projector", configuration.projector_plan()?)?;
        let mut predictor = load("online.predictor", configuration.predictor_plan()?)?;
        let mut target_backbone = load("target.backbone", configuration.backbone_plan()?)?;
        let mut target_projector = load("target.projector", configuration.projector_plan()?)?;

        let draw = |part: &str| format!("soft reset of the {part}, round {}", job.round);
        let Config { backbone_share, projector_share, predictor_share } = *config;
        let in_last_stage = |name: &str| name.starts_with(LAST_STAGE);
        reset(&mut backbone, backbone_share, job.seed, &draw("backbone"), in_last_stage)?;
        let is_hidden = |name: &str| !name.starts_with("output.");
        reset(&mut projector, projector_share, job.seed, &draw("projector"), is_hidden)?;
        reset(&mut predictor, predictor_share, job.seed, &draw("predictor"), |_| true)?;
        if [backbone_share, projector_share, predictor_share] != [1.; 3] {
            (target_backbone, target_projector) = (backbone.clone(), projector.clone());
        }

        configuration.write(&job.out)?;
        backbone_file::write(&job.out, &target_backbone)?;
        let segments = [
            ("online.backbone", &backbone),
            ("online.projector", &projector),
            ("online.predictor", &predictor),
            ("target.backbone", &target_backbone),
            ("target.projector", &target_projector),
        ];
        network_file::write(&job.out, &segments)
    }
}

/// Prefix of the parameters of the last stage of a residual network, its shortcut included.
const LAST_STAGE: &str = "layer4.";

/// `θ ← α θ + (1 − α) φ` for the parameters that `is_reset` names; with `α = 1` no bit changes.
///
/// `φ` is uniform within `±√(6 / fan-in)` for weights (Kaiming-uniform, deviation `√(2 / fan-in)`), 1 for the
/// factors of batch norms, and 0 for their shifts and for biases. Running statistics stay.
///
/// - `purpose`: of the random draw, together with the name of each parameter.
///
/// # Errors
///
/// A value is not finite.
pub fn reset(
    segment: &mut Segment,
    share: f64,
    seed: u64,
    purpose: &str,
    is_reset: impl Fn(&str) -> bool,
) -> Result<()> {
    if share == 1. {
        return Ok(());
    }
    for entry in segment.parameters.entries().to_vec() {
        if !is_reset(&entry.name) {
            continue;
        }
        let mut values = segment.parameters.get(&entry.name)?;
        let random = random_values(&entry, seed, purpose);
        for (value, random) in values.iter_mut().zip(random) {
            *value = (share * f64::from(*value) + (1. - share) * random) as f32;
        }
        segment.parameters.set(&entry.name, &values)?;
    }
    Ok(())
}

fn random_values(entry: &TensorEntry, seed: u64, purpose: &str) -> Vec<f64> {
    let count = entry.range.len();
    match entry.kind {
        EntryKind::ConvolutionWeight | EntryKind::LinearWeight => {
            let fan_in: usize = entry.shape.iter().skip(1).product();
            let bound = (6. / fan_in as f64).sqrt();
            let purpose = format!("{purpose}: {}", entry.name);
            let mut random = stage::random::stream(seed, &purpose, &[]);
            (0..count).map(|_| random.random_range(-bound..=bound)).collect()
        }
        EntryKind::NormWeight | EntryKind::RunningVariance => vec![1.; count],
        EntryKind::LinearBias | EntryKind::NormBias | EntryKind::RunningMean => vec![0.; count],
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use backbone::perceptron;
    use fixture::{Pictures, outputs};
    use stage::Split;
    use training::{Learner, Precision, SgdTable};

    use super::*;

    /// Refinement, case 10: shares of norms and of weights.
    #[test]
    fn values_go_a_part_of_the_way_to_their_draw() -> Result<()> {
        let mut segment = Segment::empty(perceptron::plan(64, 3, 2)?);
        segment.parameters.set("norm.weight", &[1.4; 3])?;
        segment.parameters.set("norm.bias", &[0.2; 3])?;
        segment.parameters.set("hidden.bias", &[0.5; 3])?;
        let start = segment.clone();
        reset(&mut segment, 0.7, 1, "a draw", |name| name != "output.weight")?;
        let get = |name: &str| segment.parameters.get(name).expect("there");
        let close = |name: &str, want: f32| {
            assert!(get(name).iter().all(|value| (value - want).abs() < 1e-6), "{name}");
        };
        close("norm.weight", 1.28);
        close("norm.bias", 0.14);
        close("hidden.bias", 0.35);
        // θ was 0, so that .3 φ is left.
        let bound = 0.3 * (6f32 / 64.).sqrt();
        let weights = get("hidden.weight");
        assert!(
            weights.iter().all(|w| w.abs() <= bound) && weights.iter().any(|w| *w > bound / 2.)
        );
        assert_eq!(get("output.weight"), [0.; 6], "it is not reset");

        let mut other = start.clone();
        reset(&mut other, 0.7, 1, "another draw", |name| name != "output.weight")?;
        assert_ne!(other.parameters.get("hidden.weight")?, weights);
        let mut same = start.clone();
        reset(&mut same, 1., 1, "a draw", |_| true)?;
        assert_eq!(same.parameters.to_vec()?, start.parameters.to_vec()?);
        Ok(())
    }

    /// Refinement, case 10: the deviation of a layer of deviation .05 and fan-in 576 after α .9.
    #[test]
    fn draws_are_kaiming_uniform() -> Result<()> {
        let mut segment = Segment::empty(perceptron::linear(576, 200, 1)?);
        let start: Vec<f32> =
            (0..576 * 200).map(|i| if i % 2 == 0 { 0.05 } else { -0.05 }).collect();
        segment.parameters.set("hidden.weight", &start)?;
        let deviation = |values: &[f32]| {
            let squares = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
            (squares / values.len() as f64).sqrt()
        };
        let mut fresh = segment.clone();
        reset(&mut fresh, 0., 1, "a draw", |name| name == "hidden.weight")?;
        let fresh = fresh.parameters.get("hidden.weight")?;
        assert!((deviation(&fresh) - 0.058926).abs() < 2e-4, "{}", deviation(&fresh));
        assert!(fresh.iter().all(|value| value.abs() < 0.102063));
        reset(&mut segment, 0.9, 1, "a draw", |name| name == "hidden.weight")?;
        let mixed = deviation(&segment.parameters.get("hidden.weight")?);
        assert!((mixed - 0.045384).abs() < 1e-4, "{mixed}");
        Ok(())
    }

    fn job(folder: &Path, out: &str, round: usize) -> Result<Job> {
        let pictures = Pictures { count: 4, pixel: fixture::scattered, split: |_| Split::Train };
        let data = fixture::data(2, &[Split::Train]);
        let mut job = fixture::job("soft-reset", folder, out, pictures, data);
        let network = folder.join("network");
        if !network.exists() {
            std::fs::create_dir(&network)?;
            let configuration: Configuration = serde_json::from_value(serde_json::json!({
                "backbone": { "depth": "10", "width": 2, "stem": "3x3" },
                "projector": { "hidden": 6, "width": 4 },
                "predictor": { "hidden": 5 },
                "channels": 1,
                "input": { "height": 6, "width": 7 },
            }))?;
            let sgd = SgdTable {
                peak_learning_rate: 0.1,
                predictor_learning_rate_factor: 1.,
                momentum: 0.,
                weight_decay: 0.,
            };
            let mut learner = Learner::random(&configuration, sgd, Precision::F32, 7)?;
            let other = Learner::random(&configuration, sgd, Precision::F32, 8)?;
            learner.target = other.target;
            configuration.write(&network)?;
            network_file::write_tensors(&network, &training::network_tensors(&mut learner)?)?;
        }
        job.inputs.insert("network".into(), network);
        Ok(Job { round, rounds: 2, ..job })
    }

    #[test]
    fn the_last_layers_are_reset_and_the_target_becomes_a_copy() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let config = Config { backbone_share: 0.9, projector_share: 0.7, predictor_share: 0.7 };
        let first = job(folder.path(), "first", 1)?;
        SoftReset::run(&config, &first)?;
        let before = network_file::open(&folder.path().join("network"))?;
        let after = network_file::open(&first.out)?;
        let mut changed = Vec::new();
        for name in before.names().filter(|name| name.starts_with("online.")) {
            if before.f32(name)? != after.f32(name)? {
                changed.push(name.to_owned());
            }
            let target = name.replace("online.", "target.");
            if before.names().any(|other| other == target) {
                assert_eq!(after.f32(&target)?, after.f32(name)?, "{target}");
            }
        }
        let reset = |name: &str| changed.iter().any(|other| other == name);
        assert!(reset("online.backbone.layer4.0.conv1.weight"));
        assert!(reset("online.projector.hidden.weight") && reset("online.predictor.output.weight"));
        assert!(!reset("online.projector.output.weight") && !reset("online.backbone.conv1.weight"));
        assert!(changed.iter().all(|name| {
            name.contains(".backbone.layer4.")
                || name.contains(".projector.")
                || name.contains(".predictor.")
        }));

        SoftReset::run(&config, &job(folder.path(), "again", 1)?)?;
        SoftReset::run(&config, &job(folder.path(), "next", 2)?)?;
        let of = |out: &str| outputs(&folder.path().join(out));
        assert!(of("first") == of("again") && of("first") != of("next"));
        Ok(())
    }

    #[test]
    fn shares_of_1_change_no_bit_and_others_are_checked() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let keep = Config { backbone_share: 1., projector_share: 1., predictor_share: 1. };
        let job = job(folder.path(), "out", 1)?;
        SoftReset::run(&keep, &job)?;
        let network = |folder: &Path| std::fs::read(folder.join(network_file::NAME));
        assert!(network(&job.out)? == network(&folder.path().join("network"))?);
        let wrong = [
            (Config { backbone_share: 1.1, ..keep.clone() }, "backbone-share"),
            (Config { projector_share: -0.1, ..keep.clone() }, "projector-share"),
            (Config { predictor_share: f64::NAN, ..keep }, "predictor-share"),
        ];
        fixture::assert_refused::<SoftReset>(&job, wrong);
        Ok(())
    }

    #[test]
    fn every_experiment_of_the_project_has_a_usable_table() {
        fixture::assert_experiments_are_usable::<SoftReset>();
    }
}
