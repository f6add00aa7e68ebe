//! What to do about a failed step, in the words of the command that the user typed.
//!
//! A stage names tables and keys of its experiment. A user of `assort cluster` cannot change those, so a
//! sentence is added that names what this user can change.

use anyhow::{Error, anyhow};
use stage::{DeviceChoice, Diverged, MachineFailed, Status};

/// The kind of command, which decides what the user can change.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Advice {
    /// A command on an experiment: any value, with --set or in the file.
    #[default]
    Experiment,
    /// `assort cluster`: its flags, and the pictures.
    Cluster,
}

/// For users of `assort cluster`, added to messages that may name tables and keys.
const NO_TABLES: &str = "tables and keys in a message above belong to the experiment that `assort cluster` \
    runs; you can change the pictures, --clusters, --backbone and --device";

impl Advice {
    /// Adds what to do to the error of a step.
    ///
    /// - `program`: the name of the step's program.
    /// - `device`: where it computed.
    pub fn add_to(self, error: Error, program: &str, device: DeviceChoice) -> Error {
        match (self, Status::of_error(&error)) {
            (Self::Experiment, Status::Diverged) => {
                let advice = "change its values with --set or in the experiment";
                Diverged(format!("{error:#}; {advice}")).into()
            }
            (Self::Cluster, Status::Diverged) => Diverged(format!(
                "{error:#}; probably the pictures look almost alike to the backbone: remove copies of the \
                 same picture, add other pictures, or pass fewer --clusters or another --backbone"
            ))
            .into(),
            (Self::Cluster, Status::BadInput) if program == "pretrained" => {
                anyhow!("{error:#}; pass another --backbone")
            }
            (Self::Cluster, Status::BadInput) => anyhow!("{error:#}; {NO_TABLES}"),
            (Self::Cluster, Status::MachineFailed) if device != DeviceChoice::Cpu => {
                MachineFailed(format!(
                    "{error:#}; if the device ran out of memory, close other programs that use it, or pass \
                     --device cpu"
                ))
                .into()
            }
            _ => error,
        }
    }

    /// How the user names the pictures.
    pub fn source_name(self) -> &'static str {
        match self {
            Self::Experiment => "--images",
            Self::Cluster => "`assort cluster PATH`",
        }
    }

    /// What to do about a failed check, from the names of the experiment and its resolved files.
    pub fn of_failed_check(self, experiment: &str, resolved: &str) -> String {
        match self {
            Self::Experiment => format!(
                "nothing was started. The experiment is `{experiment}`; with --set and [control] it became \
                 {resolved}"
            ),
            Self::Cluster => NO_TABLES.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_names_flags_that_the_command_has() {
        let said = |advice: Advice, error: Error, program: &str, device| {
            let status = Status::of_error(&error);
            let error = advice.add_to(error, program, device);
            assert_eq!(Status::of_error(&error), status);
            format!("{error:#}")
        };
        let collapsed = || Diverged("0-temi collapsed".into()).into();
        let (cpu, cuda) = (DeviceChoice::Cpu, DeviceChoice::Cuda(None));
        let full = || MachineFailed("0-embed failed".into()).into();
        let of_experiment = said(Advice::Experiment, collapsed(), "temi", cpu);
        assert!(of_experiment.ends_with("--set or in the experiment"), "{of_experiment}");
        for (error, program, device, part) in [
            (collapsed(), "temi", cpu, "--clusters"),
            (anyhow!("failed"), "pretrained", cpu, "--backbone"),
            (anyhow!("failed"), "embed", cpu, "--device"),
            (full(), "embed", cuda, "--device cpu"),
        ] {
            let message = said(Advice::Cluster, error, program, device);
            assert!(message.contains(part), "{message}");
        }
        assert_eq!(said(Advice::Cluster, full(), "embed", cpu), "0-embed failed");
        let interrupted = || Error::from(stage::Interrupted);
        let same = said(Advice::Cluster, interrupted(), "embed", cpu);
        assert_eq!(same, interrupted().to_string());
    }
}
