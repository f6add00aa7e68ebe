//! The exit status, of the programs and of this one: 0 done; 2 bad input or arguments;
//! 3 interrupted and resumable; 4 diverged or collapsed.

use std::fmt;

/// Why a run stopped before its end, where that is no plain error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stop {
    /// Asked to; it can go on. Status 3.
    Interrupted,
    /// The step of this name left the finite numbers, or found one cluster only. Status 4.
    Diverged(String),
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interrupted => write!(f, "interrupted; the same command goes on from here"),
            Self::Diverged(step) => write!(
                f,
                "{step} diverged or collapsed, its message is above; change its values with --set \
                 or in the experiment"
            ),
        }
    }
}

impl std::error::Error for Stop {}

/// The exit status for an error.
pub fn of(error: &anyhow::Error) -> u8 {
    match error.downcast_ref() {
        Some(Stop::Interrupted) => 3,
        Some(Stop::Diverged(_)) => 4,
        None => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_tells_what_happened_through_added_context() {
        assert_eq!(of(&anyhow::anyhow!("no such file")), 2);
        assert_eq!(of(&anyhow::Error::new(Stop::Interrupted).context("seed 1")), 3);
        assert_eq!(of(&Stop::Diverged("0-pretraining".into()).into()), 4);
    }
}
