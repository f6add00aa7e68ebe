//! The command line that every stage understands.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;

/// Arguments of a stage program, the same for all of them.
#[derive(Debug, Clone, Parser)]
pub struct StageArguments {
    /// Experiment file; the program reads `[data]` and the table of its own name.
    #[arg(long, value_name = "FILE")]
    pub experiment: PathBuf,
    /// The prepared pictures, `images.safetensors`.
    #[arg(long, value_name = "FILE")]
    pub images: PathBuf,
    /// The folder of an earlier output, by the role it plays here; may be given several times.
    #[arg(long = "in", value_name = "ROLE=DIR", value_parser = role)]
    pub inputs: Vec<(String, PathBuf)>,
    /// Folder to write into; created if missing. An unfinished run in it is resumed.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Which round of the loop this is, from 0.
    #[arg(long, default_value_t = 0)]
    pub round: usize,
    /// How many rounds follow round 0.
    #[arg(long, default_value_t = 0)]
    pub rounds: usize,
    /// Seed of every random draw.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Where to compute: auto, cpu, cuda, cuda:N or metal.
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// Check the table, the inputs that exist and the device, print the table, and stop.
    #[arg(long)]
    pub check: bool,
}

fn role(argument: &str) -> Result<(String, PathBuf), String> {
    match argument.split_once('=') {
        Some((role, path)) if !role.is_empty() && !path.is_empty() => {
            Ok((role.to_owned(), PathBuf::from(path)))
        }
        _ => {
            Err(format!("`{argument}` is not ROLE=DIR, as in network=runs/digits/0/0-pretraining"))
        }
    }
}

/// Where to compute, as asked for on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// CUDA or Metal where the program was built for it and the machine has it, else the CPU.
    Auto,
    /// The processor.
    Cpu,
    /// A CUDA device by its number. Without a number it is the first one, or, of several ranks on a machine, the one
    /// of this rank.
    Cuda(Option<usize>),
    /// Apple's GPU.
    Metal,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(None)),
            "metal" => Ok(Self::Metal),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(|number| Self::Cuda(Some(number)))
                .ok_or_else(|| {
                    format!("no device `{text}`; one of auto, cpu, cuda, cuda:N, metal")
                }),
        }
    }
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(None) => write!(f, "cuda"),
            Self::Cuda(Some(number)) => write!(f, "cuda:{number}"),
            Self::Metal => write!(f, "metal"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<StageArguments, clap::Error> {
        let fixed = ["stage", "--experiment", "e.toml", "--images", "i.safetensors", "--out", "o"];
        StageArguments::try_parse_from(fixed.iter().chain(words))
    }

    #[test]
    fn a_role_needs_a_name_and_a_folder() {
        let one = parse(&["--in", "network=a/b=c", "--in", "previous=p"]).expect("valid");
        let inputs = [("network".to_owned(), "a/b=c".into()), ("previous".to_owned(), "p".into())];
        assert_eq!(one.inputs, inputs);
        for wrong in ["network", "=a", "network="] {
            assert!(parse(&["--in", wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn devices_are_read_as_they_are_printed() {
        for text in ["auto", "cpu", "cuda", "cuda:0", "cuda:3", "metal"] {
            assert_eq!(text.parse::<DeviceChoice>().expect(text).to_string(), text);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(None)));
        assert_eq!("cuda:0".parse(), Ok(DeviceChoice::Cuda(Some(0))));
        assert!("cuda:x".parse::<DeviceChoice>().expect_err("no number").contains("cuda:x"));
        assert!("tpu".parse::<DeviceChoice>().is_err());
    }
}
