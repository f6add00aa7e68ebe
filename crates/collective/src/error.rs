//! The error of a collective operation.

use std::fmt;

/// A rank has ended, or the ranks do not agree on what they compute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommunicationError(String);

impl CommunicationError {
    pub(crate) fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for CommunicationError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for CommunicationError {}
