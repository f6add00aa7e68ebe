//! The machine that a benchmark runs on, and whether it does other work.

use std::fmt;
use std::fs;
use std::thread;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The machine that a benchmark ran on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Machine {
    /// Model of the processor, as the system names it.
    pub processor: String,
    /// The vector instructions that it has, of those that kernels use.
    pub instructions: Vec<String>,
    /// How many processors the system shows.
    pub processors: usize,
    /// Share of processor time that other work used right before, in `[0, 1]`. It includes time that the host
    /// gave to other machines. `None` if the system does not say.
    pub busy: Option<f64>,
}

/// How long other work is watched.
const WATCHED: Duration = Duration::from_millis(500);

/// Share of processor time from which on other work disturbs a measurement.
const DISTURBED: f64 = 0.05;

impl Machine {
    /// Inspects this machine and watches other work for half a second. Call it before the work starts.
    pub fn inspect() -> Self {
        let before = processor_time();
        thread::sleep(WATCHED);
        let busy = before.zip(processor_time()).and_then(|((used, all), (used_now, all_now))| {
            let passed = all_now.checked_sub(all).filter(|&passed| passed > 0)?;
            Some(used_now.saturating_sub(used) as f64 / passed as f64)
        });
        Self {
            processor: processor().unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
            instructions: instructions().into_iter().map(str::to_owned).collect(),
            processors: thread::available_parallelism().map_or(1, usize::from),
            busy,
        }
    }
}

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { processor, processors, .. } = self;
        write!(f, "{processor}, {processors} processors, {}; ", self.instructions.join(" "))?;
        match self.busy {
            None => f.write_str("whether it is idle is unknown"),
            Some(busy) if busy < DISTURBED => f.write_str("idle"),
            Some(busy) => write!(
                f,
                "BUSY: other work takes {:.0} % of it, so compare ratios, not times",
                100. * busy
            ),
        }
    }
}

/// The processor's model.
#[cfg(target_os = "linux")]
fn processor() -> Option<String> {
    let text = fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

#[cfg(target_os = "macos")]
fn processor() -> Option<String> {
    let mut command = std::process::Command::new("sysctl");
    let output = command.args(["-n", "machdep.cpu.brand_string"]).output().ok()?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned()).filter(|name| !name.is_empty())
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn processor() -> Option<String> {
    None
}

/// Ticks of all processors since the start of the system: those in use or taken by the host, and all.
fn processor_time() -> Option<(u64, u64)> {
    ticks(&fs::read_to_string("/proc/stat").ok()?)
}

/// Reads the first line of `/proc/stat`: user, nice, system, idle, waiting for input, interrupts (2), stolen,
/// and guests, which user has already.
fn ticks(stat: &str) -> Option<(u64, u64)> {
    let words = stat.lines().next()?.strip_prefix("cpu ")?;
    let ticks: Vec<u64> = words.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let all: u64 = ticks.get(..8)?.iter().sum();
    Some((all - ticks[3] - ticks[4], all))
}

#[cfg(target_arch = "x86_64")]
fn instructions() -> Vec<&'static str> {
    let found = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bf16", is_x86_feature_detected!("avx512bf16")),
        (
            "amx-bf16",
            fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("amx_bf16")),
        ),
    ];
    found.into_iter().filter_map(|(name, has)| has.then_some(name)).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn instructions() -> Vec<&'static str> {
    vec![std::env::consts::ARCH]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stolen_time_counts_as_use_and_guests_count_once() {
        let stat = "cpu  10 1 5 100 4 2 3 20 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(ticks(stat), Some((41, 145)));
        assert_eq!(ticks("intr 1 2"), None);
        assert_eq!(ticks("cpu 1 2 3"), None);
    }

    #[test]
    fn a_busy_machine_is_named_so() {
        let of = |busy| Machine {
            processor: "X".into(),
            instructions: vec!["avx2".into(), "fma".into()],
            processors: 2,
            busy,
        };
        assert_eq!(of(Some(0.01)).to_string(), "X, 2 processors, avx2 fma; idle");
        assert!(of(Some(0.37)).to_string().contains("BUSY: other work takes 37 %"));
        assert!(of(None).to_string().ends_with("unknown"));
    }
}
