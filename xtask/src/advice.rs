//! What to do about a failed step, in the words of the command that the user typed.
//!
//! A stage names tables and keys of its experiment. A user of `assort cluster` cannot change those. So the messages of
//! stages are not printed there but kept in a file, and this user reads one message that names what can be changed.

use std::path::PathBuf;

use anyhow::{Error, anyhow};
use stage::{DeviceChoice, Diverged, MachineFailed, Status};

use crate::process::MessageTo;

/// The kind of command, which decides what the user can change.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Advice {
    /// A command on an experiment: any value, with --set or in the file.
    #[default]
    Experiment,
    /// `assort cluster`: its flags, and the pictures.
    Cluster {
        /// The file for the messages of the programs.
        errors: PathBuf,
    },
}

/// For users of `assort cluster`, added to messages that may name tables and keys.
const NO_TABLES: &str = "tables and keys in this message belong to the experiment that `assort cluster` runs; you \
    can change the pictures, --clusters, --backbone and --device";

impl Advice {
    /// Where the messages of the programs go.
    pub fn message(&self) -> MessageTo<'_> {
        match self {
            Self::Experiment => MessageTo::Stderr,
            Self::Cluster { errors } => MessageTo::ErrorAndFile(errors),
        }
    }

    /// Adds what to do to the error of a step, or says it in other words.
    ///
    /// - `program`: the name of the step's program.
    /// - `device`: where it computed.
    pub fn add_to(&self, error: Error, program: &str, device: DeviceChoice) -> Error {
        match (self, Status::of_error(&error)) {
            (Self::Experiment, Status::Diverged) => {
                let advice = "change its values with --set or in the experiment";
                Diverged(format!("{error:#}; {advice}")).into()
            }
            (Self::Cluster { errors }, Status::Diverged) => Diverged(format!(
                "the pictures could not be grouped: probably they look almost alike to the backbone; remove \
                 copies of the same picture, add other pictures, or pass fewer --clusters or another \
                 --backbone (`{}` has the message of the step)",
                errors.display()
            ))
            .into(),
            (Self::Cluster { .. }, Status::BadInput) if program == "pretrained" => {
                anyhow!("--backbone: {error:#}; or pass another --backbone")
            }
            (Self::Cluster { .. }, Status::BadInput) => {
                anyhow!("the step `{program}` failed: {error:#}; {NO_TABLES}")
            }
            (Self::Cluster { .. }, Status::MachineFailed) if device != DeviceChoice::Cpu => {
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
    pub fn source_name(&self) -> &'static str {
        match self {
            Self::Experiment => "--images",
            Self::Cluster { .. } => "`assort cluster PATH`",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_advice_names_flags_that_the_command_has() {
        let said = |advice: &Advice, error: Error, program: &str, device| {
            let status = Status::of_error(&error);
            let error = advice.add_to(error, program, device);
            assert_eq!(Status::of_error(&error), status);
            format!("{error:#}")
        };
        let collapsed = || Diverged("0-temi collapsed".into()).into();
        let (cpu, cuda) = (DeviceChoice::Cpu, DeviceChoice::Cuda(None));
        let full = || MachineFailed("0-embed failed".into()).into();
        let cluster = Advice::Cluster { errors: PathBuf::from("runs/x/errors.log") };
        let of_experiment = said(&Advice::Experiment, collapsed(), "temi", cpu);
        assert!(of_experiment.ends_with("--set or in the experiment"), "{of_experiment}");
        for (error, program, device, part) in [
            (collapsed(), "temi", cpu, "--clusters"),
            (collapsed(), "temi", cpu, "runs/x/errors.log"),
            (anyhow!("failed"), "pretrained", cpu, "--backbone"),
            (anyhow!("failed"), "embed", cpu, "--device"),
            (full(), "embed", cuda, "--device cpu"),
        ] {
            let message = said(&cluster, error, program, device);
            assert!(message.contains(part), "{message}");
            assert!(!message.contains("0-temi"), "said in other words: {message}");
        }
        assert_eq!(said(&cluster, full(), "embed", cpu), "0-embed failed");
        let interrupted = || Error::from(stage::Interrupted);
        let same = said(&cluster, interrupted(), "embed", cpu);
        assert_eq!(same, interrupted().to_string());
    }
}
