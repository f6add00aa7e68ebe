//! What a step has cost: seconds and memory, kept beside its result.
//!
//! A step that is stopped and goes on adds up. Results do not know their cost: it is written here
//! after the program has ended, never by the program.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Name of the file in a step's folder: one line for each time the step was started.
const NAME: &str = "cost.jsonl";

/// Time and memory of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StepCost {
    /// From start to end, over all times it was started.
    pub seconds: f64,
    /// Most memory that was in use at once, in bytes; absent where the system does not tell.
    pub peak_bytes: Option<u64>,
}

impl StepCost {
    /// Both together, one after the other.
    pub fn and(self, other: Self) -> Self {
        Self {
            seconds: self.seconds + other.seconds,
            peak_bytes: self.peak_bytes.max(other.peak_bytes),
        }
    }

    /// What the step in `folder` has cost over all its starts; nothing where no start is on record.
    pub fn read(folder: &Path) -> Option<Self> {
        let text = fs::read_to_string(folder.join(NAME)).ok()?;
        // A full disk or a kill can leave half a line.
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).reduce(Self::and)
    }

    /// Adds this to what the step in `folder` has cost before.
    ///
    /// The folder may be finished, and then nobody clears it any more: the line is appended,
    /// because a replaced file would leave its temporary one behind when this process is killed.
    pub fn add_to(self, folder: &Path) -> Result<()> {
        let path = folder.join(NAME);
        let write = || -> Result<()> {
            let mut file = File::options().create(true).append(true).open(&path)?;
            Ok(file.write_all(format!("{}\n", serde_json::to_string(&self)?).as_bytes())?)
        };
        write().with_context(|| format!("writing `{}`", path.display()))
    }
}

/// The most memory that a running process has had in use, in bytes.
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
    fn costs_of_a_step_that_went_on_add_up() {
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
    fn memory_is_read_as_linux_tells_it() {
        assert_eq!(peak_in("Name:\tx\nVmPeak:\t  900 kB\nVmHWM:\t  345 kB\n"), Some(345 * 1024));
        assert_eq!(peak_in("Name:\tx\n"), None);
    }
}
