//! The orchestrator: runs the stages of an experiment in order and reports their results.
//!
//! It links no stage. The program `assort` links this library and the stages, and passes it a
//! [`Registry`]. Each step is a process of that same program, or a foreign executable.
//!
//! From the `commands` to the table: the experiment has every value but the seed. The `plan` is the
//! list of steps with their inputs. A `setup` has the `programs`, the device and the `prepared`
//! pictures. Every step has a `key`, under which the `store` keeps its result. The `run` checks all
//! steps and starts a `process` for each that is not done. The `results` are the table at the end.
//! A `record` of the steps tells `report`, `predict`, `export` and `clusters` what to read.

mod advice;
pub mod cargo;
mod cluster;
mod clusters;
mod commands;
mod compare;
mod cost;
mod export;
mod gain;
mod heads;
mod jobs;
mod key;
mod owner;
mod plan;
mod predict;
mod prepare;
mod prepared;
mod process;
mod programs;
mod record;
mod report;
mod reproduce;
pub mod result_record;
mod results;
mod run;
mod setup;
mod source;
mod store;
mod view;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use stage::{DeviceChoice, Interrupt, Library, Program, Spec};

pub use commands::main;

/// What the linking program provides: stages, experiments, data.
#[derive(Debug, Clone)]
pub struct Registry {
    /// The stages, in the order in which they are listed.
    pub stages: Vec<Program>,
    /// The programs behind `prepare`, `predict`, `report`, `export` and `clusters`.
    pub helpers: Vec<Helper>,
    /// The experiments.
    pub library: Library,
    /// Data sets that are embedded in the program.
    pub data: Vec<EmbeddedData>,
    /// The devices that it can compute on.
    pub devices: Devices,
}

/// A program that a command starts like a stage, but that fills no place of an experiment.
#[derive(Debug, Clone, Copy)]
pub struct Helper {
    /// Its name.
    pub name: &'static str,
    /// The version of its results, see [`Spec::algorithm`].
    pub algorithm: u32,
    /// Runs a command line, whose first word is the program's name, and returns the exit status.
    pub main: fn(Vec<OsString>) -> ExitCode,
}

/// A data set that is embedded in the program, for use where its folder is missing.
#[derive(Debug, Clone)]
pub struct EmbeddedData {
    /// The folder that is the `source` in experiments.
    pub folder: &'static str,
    /// Its files, by name.
    pub files: Vec<(&'static str, &'static [u8])>,
}

/// The devices that the program can compute on.
#[derive(Debug, Clone, Copy)]
pub struct Devices {
    /// Resolves `auto`. Fails if the machine or the program lacks the device.
    pub resolve: fn(DeviceChoice) -> Result<DeviceChoice>,
    /// Compares a device with the CPU and prints the result. Returns `false` if they differ.
    pub check: fn(DeviceChoice) -> Result<bool>,
    /// The cargo features for GPUs that the program was built with.
    pub features: &'static [&'static str],
    /// What `--version` prints after the version.
    pub describe: fn() -> String,
}

impl Registry {
    /// The specification of the stage of this name.
    fn spec(&self, name: &str) -> Option<&Spec> {
        self.stages.iter().map(|program| &program.spec).find(|spec| spec.name == name)
    }

    /// The specifications of all stages.
    fn specs(&self) -> Vec<Spec> {
        self.stages.iter().map(|program| program.spec).collect()
    }
}

/// What every command needs: the registry, and whether to stop.
#[derive(Debug)]
struct CommandContext {
    registry: Registry,
    /// Raised if the user or the system asks to stop.
    interrupt: Interrupt,
}
