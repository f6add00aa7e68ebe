//! The cost of a step in seconds and memory, recorded beside its result.
//!
//! The costs of an interrupted step and of its resumption are added. The orchestrator records them
//! after the program ends; the result itself does not contain its cost.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Name of the file in a step's folder: one line per start of the step.
const NAME: &str = "cost.jsonl";

/// Time and memory of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StepCost {
    /// Elapsed time of all its starts.
    pub seconds: f64,
    /// Peak memory in bytes; `None` if the system does not report it.
    pub peak_bytes: Option<u64>,
}

impl StepCost {
    /// The cost of both, one after the other.
    pub fn and(self, other: Self) -> Self {
        Self {
            seconds: self.seconds + other.seconds,
            peak_bytes: self.peak_bytes.max(other.peak_bytes),
        }
    }

    /// Reads the cost of the step in `folder` over all its starts; `None` if none is recorded.
    pub fn read(folder: &Path) -> Option<Self> {
        let text = fs::read_to_string(folder.join(NAME)).ok()?;
        // A full disk or a kill can leave an incomplete line.
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).reduce(Self::and)
    }

    /// Adds this to the cost of the step in `folder`.
    ///
    /// Appends a line instead of replacing the file: a kill during a replacement would leave a
    /// temporary file, which is never removed from a finished folder.
    pub fn add_to(self, folder: &Path) -> Result<()> {
        let path = folder.join(NAME);
        let write = || -> Result<()> {
            let mut file = File::options().create(true).append(true).open(&path)?;
            Ok(file.write_all(format!("{}\n", serde_json::to_string(&self)?).as_bytes())?)
        };
        write().with_context(|| format!("writing `{}`", path.display()))
    }
}

/// The peak memory of a running process so far, in bytes.
pub fn peak_of(process: u32) -> Option<u64> {
    peak_in(&fs::read_to_string(format!("/proc/{process}/status")).ok()?)
}

fn peak_in(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(1024 * kibibytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_of_a_resumed_step_add_up() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(StepCost::read(folder.path()), None);
        let first = StepCost { seconds: 2., peak_bytes: Some(100) };
        first.add_to(folder.path()).expect("written");
        StepCost { seconds: 1.5, peak_bytes: None }.add_to(folder.path()).expect("written");
        let sum = StepCost { seconds: 3.5, peak_bytes: Some(100) };
        assert_eq!(StepCost::read(folder.path()), Some(sum));
        let names = fs::read_dir(folder.path()).expect("there").count();
        assert_eq!(names, 1, "only the one file");
        assert_eq!(
            first.and(StepCost { seconds: 1., peak_bytes: Some(300) }).peak_bytes,
            Some(300)
        );
    }

    #[test]
    fn memory_is_read_as_linux_reports_it() {
        assert_eq!(peak_in("Name:\tx\nVmPeak:\t  900 kB\nVmHWM:\t  345 kB\n"), Some(345 * 1024));
        assert_eq!(peak_in("Name:\tx\n"), None);
    }
}
