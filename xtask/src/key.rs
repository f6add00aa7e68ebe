//! Keys: a step's result is identified by everything that it depends on.
//!
//! The key of a step is the SHA-256 of its program's identity, its table and `[data]` as resolved
//! (without the number of clusters if the stage does not depend on it), seed, round, device and
//! processor, the pictures (unless the stage does not depend on them), and of the keys of its inputs. So
//! experiments with the same pretraining share it, and a changed value never reuses an old result.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::collections::BTreeMap;
use std::env;
use std::fmt;

use serde_json::{Value, json};
use stage::digest::sha256;
use stage::{DeviceChoice, Experiment};

use crate::plan::Step;
use crate::programs::{Executable, table_of};

/// The name of a result: its kind, and a digest of everything that it depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreKey {
    name: String,
    /// The digested value, to find out why two keys differ.
    pub record: Value,
}

impl fmt::Display for StoreKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl StoreKey {
    /// The key of a record. `what` is a prefix that makes paths readable.
    pub fn of(what: &str, record: Value) -> Self {
        // 64 bits of the digest are enough: a collision is practically impossible.
        let digest = &sha256(record.to_string().as_bytes())[..16];
        Self { name: format!("{what}-{digest}"), record }
    }

    /// The name of the result's folder in the store.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The key of a step whose inputs have these identities.
    pub fn of_step(
        step: &Step,
        experiment: &Experiment,
        program: &Executable,
        surroundings: &Surroundings,
        inputs: BTreeMap<&str, String>,
    ) -> Self {
        let table = |name: &str| serde_json::to_value(experiment.value(name)).unwrap_or_default();
        let mut data = table("data");
        if !program.depends_on_clusters {
            data.as_object_mut().and_then(|data| data.remove("clusters"));
        }
        let mut tables = BTreeMap::from([("data", data)]);
        let name = table_of(&step.program);
        tables.insert(name, table(name));
        if experiment.value(name).is_none() {
            // A foreign program may read the table of its place.
            tables.insert(step.place.name, table(step.place.name));
        }
        let record = json!({
            "program": program.identity,
            "tables": tables,
            "round": step.round,
            "rounds": step.rounds,
            "seed": surroundings.seed,
            "machine": surroundings.machine,
            "environment": environment(),
            "images": program.depends_on_images.then_some(&surroundings.images),
            "inputs": inputs,
        });
        Self::of(step.place.name, record)
    }
}

/// Everything else that all steps of one run depend on.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Seed of every random draw.
    pub seed: u64,
    /// The device or processor, see [`machine`].
    pub machine: Value,
    /// Header of the prepared pictures, with their fingerprint and digest.
    pub images: String,
}

/// Identifies what computes: a CPU by its instructions, which decide the kernel; a GPU by its kind
/// and the features that the program was built with.
///
/// `device` must be resolved: `auto` means different devices on different machines.
pub fn machine(device: DeviceChoice, features: &[&str]) -> Value {
    let gpu = |kind: &str| json!({ "device": kind, "features": features });
    match device {
        DeviceChoice::Cpu => {
            json!(format!("cpu {} {} {}", env::consts::OS, env::consts::ARCH, instructions()))
        }
        DeviceChoice::Cuda(_) => gpu("cuda"),
        DeviceChoice::Metal => gpu("metal"),
        DeviceChoice::Auto => gpu("auto"),
    }
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> &'static str {
    // Tiles and their products of bfloat16: bits 24 and 22. We do not check OS support: a needless
    // recomputation is harmless, a wrong cache hit is not.
    let tiles = 1 << 24 | 1 << 22;
    if __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & tiles == tiles {
        "amx"
    } else if is_x86_feature_detected!("avx512bf16") {
        "avx512-bf16"
    } else if is_x86_feature_detected!("avx512f") {
        "avx512"
    } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        "avx2"
    } else {
        "plain"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn instructions() -> &'static str {
    "plain"
}

/// The environment variables that change results: the choice of kernel. The number of threads and a
/// decoded copy of the pictures change nothing.
fn environment() -> BTreeMap<String, String> {
    env::vars().filter(|(name, _)| name == "ASSORT_KERNEL").collect()
}

#[cfg(test)]
mod tests {
    use stage::{Ranks, Spec};

    use super::*;
    use crate::plan::Arm;

    fn experiment(text: &str) -> Experiment {
        Experiment::of_text("example", text).expect("TOML")
    }

    const TEXT: &str = "[data]\nclusters = 3\n[embed]\nviews = 8\n[clustering]\nheads = 6";

    fn step() -> Step {
        Step {
            arm: Arm::Main,
            place: Spec {
                name: "embed",
                algorithm: 1,
                inputs: &[],
                outputs: &[],
                ranks: Ranks::One,
            },
            round: 1,
            rounds: 2,
            program: "embed".into(),
            inputs: vec![],
        }
    }

    fn program() -> Executable {
        Executable {
            path: "bin/assort".into(),
            identity: json!({ "name": "embed", "algorithm": 1 }),
            words: Some(vec!["embed"]),
            depends_on_clusters: false,
            depends_on_images: true,
            ranks: 1,
        }
    }

    fn surroundings() -> Surroundings {
        let machine = machine(DeviceChoice::Cpu, &[]);
        Surroundings { seed: 0, machine, images: "some".into() }
    }

    fn key(step: &Step, text: &str, program: &Executable, surroundings: &Surroundings) -> String {
        let inputs = BTreeMap::from([("network", "pretraining-1".to_owned())]);
        StoreKey::of_step(step, &experiment(text), program, surroundings, inputs).to_string()
    }

    #[test]
    fn a_key_changes_with_exactly_what_the_result_depends_on() {
        let first = key(&step(), TEXT, &program(), &surroundings());
        assert!(first.starts_with("embed-") && first.len() == "embed-".len() + 16, "{first}");

        let of_step = |step: Step| key(&step, TEXT, &program(), &surroundings());
        let of_text = |text: &str| key(&step(), text, &program(), &surroundings());
        let of_program = |program: Executable| key(&step(), TEXT, &program, &surroundings());
        let in_these = |surroundings: Surroundings| key(&step(), TEXT, &program(), &surroundings);
        let same = [
            of_text(&TEXT.replace("heads = 6", "heads = 7")),
            of_text(&TEXT.replace("clusters = 3", "clusters = 4")),
            of_step(Step { arm: Arm::Control, ..step() }),
            of_program(Executable { path: "other/assort".into(), ..program() }),
            in_these(Surroundings {
                machine: machine(DeviceChoice::Cpu, &["cuda"]),
                ..surroundings()
            }),
        ];
        for other in same {
            assert_eq!(other, first);
        }
        let different = [
            of_text(&TEXT.replace("views = 8", "views = 9")),
            of_text(&TEXT.replace("[data]", "[data]\ntrain-on = ['test']")),
            of_step(Step { round: 2, ..step() }),
            of_step(Step { rounds: 3, ..step() }),
            of_program(Executable {
                identity: json!({ "name": "embed", "algorithm": 2 }),
                ..program()
            }),
            in_these(Surroundings { seed: 1, ..surroundings() }),
            in_these(Surroundings {
                machine: machine(DeviceChoice::Cuda(None), &[]),
                ..surroundings()
            }),
            in_these(Surroundings { images: "other".into(), ..surroundings() }),
            StoreKey::of_step(
                &step(),
                &experiment(TEXT),
                &program(),
                &surroundings(),
                BTreeMap::new(),
            )
            .to_string(),
        ];
        for other in different {
            assert_ne!(other, first);
        }
    }

    #[test]
    fn the_number_of_clusters_counts_where_a_program_depends_on_it() {
        let program = Executable { depends_on_clusters: true, ..program() };
        let key = |text: &str| key(&step(), text, &program, &surroundings());
        assert_ne!(key(TEXT), key(&TEXT.replace("clusters = 3", "clusters = 4")));
    }

    #[test]
    fn the_pictures_count_unless_a_program_does_not_depend_on_them() {
        let key = |depends_on_images: bool, images: &str| {
            let surroundings = Surroundings { images: images.into(), ..surroundings() };
            key(&step(), TEXT, &Executable { depends_on_images, ..program() }, &surroundings)
        };
        assert_eq!(key(false, "some"), key(false, "others"));
        assert_ne!(key(true, "some"), key(true, "others"));
    }

    #[test]
    fn a_foreign_program_is_keyed_by_the_table_of_its_place() {
        let foreign = Step { program: "tools/mine.py".into(), ..step() };
        let one = key(&foreign, TEXT, &program(), &surroundings());
        let changed = TEXT.replace("views = 8", "views = 9");
        assert_ne!(one, key(&foreign, &changed, &program(), &surroundings()));
    }

    #[test]
    fn cards_of_one_kind_share_results_and_builds_with_other_features_do_not() {
        let cuda = |number, features| machine(DeviceChoice::Cuda(number), features);
        assert_eq!(cuda(Some(1), &["cuda"]), cuda(None, &["cuda"]));
        assert_ne!(cuda(None, &["cuda"]), cuda(None, &["cuda", "cudnn"]));
        assert_ne!(cuda(None, &[]), machine(DeviceChoice::Metal, &[]));
        let cpu = machine(DeviceChoice::Cpu, &[]);
        for other in [DeviceChoice::Auto, DeviceChoice::Cuda(None), DeviceChoice::Metal] {
            assert_ne!(machine(other, &[]), cpu);
        }
    }
}
