//! The orchestrator: runs the stages of an experiment in order, and reports what they found.
//!
//! It links no stage. The program that links this library and the stages, `assort`, gives it a
//! [`Registry`]; a step is a process of that same program, or a foreign executable.
//!
//! From the `commands` to the table: the experiment says everything but the seed; the `plan`
//! says which steps that makes and what each is given; a `setup` has the `programs`, the device
//! and the `prepared` pictures; every step has a `key`, under which the `store` keeps its
//! result; the `run` checks all steps and starts a `process` for each that is not done; the
//! `results` are the table at the end. The run leaves a `record` of its steps, from which
//! `report`, `predict` and `clusters` know what to read.

mod cluster;
mod clusters;
mod commands;
mod compare;
mod cost;
mod key;
mod plan;
mod predict;
mod prepare;
mod prepared;
mod process;
mod programs;
mod record;
mod report;
mod reproduce;
mod results;
mod run;
mod setup;
mod source;
mod store;

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use stage::{DeviceChoice, Interrupt, Library, Program, Spec};

pub use commands::main;

/// What the program that links this library brings along: stages, experiments, data.
#[derive(Debug, Clone)]
pub struct Registry {
    /// The stages, in the order in which they are listed.
    pub stages: Vec<Program>,
    /// The programs behind `prepare`, `predict`, `report` and `clusters`.
    pub helpers: Vec<Helper>,
    /// The experiments.
    pub library: Library,
    /// Data sets that the program holds.
    pub data: Vec<EmbeddedData>,
    /// What it can compute on.
    pub devices: Devices,
}

/// A program behind a command: started like a stage, but no place of an experiment.
#[derive(Debug, Clone, Copy)]
pub struct Helper {
    /// Its name.
    pub name: &'static str,
    /// Version of its results, see [`Spec::algorithm`].
    pub algorithm: u32,
    /// Takes the command line, whose first word is the program's name; returns the exit status.
    pub main: fn(Vec<OsString>) -> ExitCode,
}

/// A data set that the program holds, so that it can be used where its folder is missing.
#[derive(Debug, Clone)]
pub struct EmbeddedData {
    /// The folder that experiments name as `source`.
    pub folder: &'static str,
    /// Its files, by name.
    pub files: Vec<(&'static str, &'static [u8])>,
}

/// What the program can compute on.
#[derive(Debug, Clone, Copy)]
pub struct Devices {
    /// Resolves `auto`; fails for a device that this machine or this program lacks.
    pub resolve: fn(DeviceChoice) -> Result<DeviceChoice>,
    /// Compares a device with the CPU and prints what it found; false where they differ.
    pub check: fn(DeviceChoice) -> Result<bool>,
    /// The features of cargo that bring in a GPU, as far as the program was built with them.
    pub features: &'static [&'static str],
    /// What `--version` prints after the version.
    pub describe: fn() -> String,
}

impl Registry {
    /// What an orchestrator must know of the stage of this name.
    fn spec(&self, name: &str) -> Option<&Spec> {
        self.stages.iter().map(|program| &program.spec).find(|spec| spec.name == name)
    }

    /// The specifications of all stages.
    fn specs(&self) -> Vec<Spec> {
        self.stages.iter().map(|program| program.spec).collect()
    }
}

/// What every command needs: what the program brings along, and whether it is to stop.
#[derive(Debug)]
struct CommandContext {
    registry: Registry,
    /// Raised when the user or the system asks to stop.
    interrupt: Interrupt,
}
