//! What one forward pass keeps for its backward pass.

use std::sync::Arc;

use kernels::norm::Normalisation;
use kernels::{Buffer, Shape};

use crate::plan::Plan;

/// What one forward pass keeps, for one input shape, until its backward pass consumes it.
///
/// A step holds as many as it needs: two views, crops of two sizes, a last small batch. The memory
/// comes from the network's pool and goes back there when the tape is consumed, cleared or dropped.
#[derive(Default)]
pub struct Tape {
    pub(crate) record: Option<Record>,
}

pub(crate) struct Record {
    pub plan: Arc<Plan>,
    /// Of the parameters that the forward pass saw.
    pub version: u64,
    pub shapes: Vec<Shape>,
    /// The values that the backward pass reads; the others are `None`.
    pub values: Vec<Option<Buffer>>,
    /// What each operation keeps beside values.
    pub notes: Vec<Note>,
}

pub(crate) enum Note {
    Nothing,
    Normalisation(Normalisation),
    /// Bytes: which pixel of each window held the maximum.
    Taps(Buffer),
}

impl Tape {
    /// Whether no forward pass waits on this tape for its backward pass.
    pub fn is_empty(&self) -> bool {
        self.record.is_none()
    }

    /// Forgets the forward pass, for a step that is given up.
    pub fn clear(&mut self) {
        self.record = None;
    }
}
