//! Where the time of a step goes: kind of layer × direction, with the work that it was.
//!
//! [`record`] switches the clocks on for the whole process; without it an operation looks at one
//! flag. The times are of operations one after the other, each on all threads, so they add up.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use kernels::convolution::Geometry;
use kernels::{Precision, Shape};

/// What all operations of one kind and direction took.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// How often it ran.
    pub count: usize,
    /// Seconds.
    pub seconds: f64,
    /// Floating-point operations of products, two for each multiplication; those with the zeros
    /// beyond the border are not counted. 0 for what is no product.
    pub operations: f64,
    /// Bytes of all values read and written, each counted once.
    pub bytes: f64,
}

/// Which way an operation ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Direction {
    /// From input to output.
    Forward,
    /// The gradient of the input from that of the output.
    Backward,
    /// The gradient of the weights.
    Weights,
}

type Table = BTreeMap<(String, Direction), Cost>;

static ON: AtomicBool = AtomicBool::new(false);
static TABLE: Mutex<Table> = Mutex::new(Table::new());

/// Runs `work` with the clocks on and returns what it took, by kind of operation and direction.
/// Operations of other threads meanwhile are counted too.
pub fn record(work: impl FnOnce()) -> Vec<(String, Direction, Cost)> {
    *TABLE.lock().unwrap_or_else(PoisonError::into_inner) = Table::new();
    ON.store(true, Ordering::Relaxed);
    work();
    ON.store(false, Ordering::Relaxed);
    let table = std::mem::take(&mut *TABLE.lock().unwrap_or_else(PoisonError::into_inner));
    table.into_iter().map(|((kind, direction), cost)| (kind, direction, cost)).collect()
}

/// Starts the clock of one operation, if somebody asked for it.
pub(crate) fn start() -> Option<Instant> {
    ON.load(Ordering::Relaxed).then(Instant::now)
}

/// Stops the clock of one operation; `cost` gives its kind and work.
pub(crate) fn stop(
    clock: Option<Instant>,
    direction: Direction,
    cost: impl FnOnce() -> (String, Cost),
) {
    let Some(start) = clock else { return };
    let seconds = start.elapsed().as_secs_f64();
    let (kind, cost) = cost();
    let mut table = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
    let total = table.entry((kind, direction)).or_default();
    total.count += 1;
    total.seconds += seconds;
    total.operations += cost.operations;
    total.bytes += cost.bytes;
}

/// A product: both values and the weights.
pub(crate) fn product(g: &Geometry, precision: Precision) -> (String, Cost) {
    let kind = if g.input.pixels() == 1 && g.kernel == 1 {
        "linear".to_owned()
    } else {
        let Geometry { kernel, stride, .. } = g;
        let few = if g.input.channels <= 4 { ", stem" } else { "" };
        format!("{kernel}x{kernel}/{stride}{few}")
    };
    let values = g.input.len() + g.output.len() + g.weights_len();
    let operations = 2. * g.multiplications() as f64;
    (kind, Cost { operations, bytes: (values * precision.bytes()) as f64, ..Cost::default() })
}

/// An operation that passes over values of this shape so many times.
pub(crate) fn passes(
    kind: &str,
    shape: Shape,
    precision: Precision,
    times: usize,
) -> (String, Cost) {
    let bytes = (times * shape.len() * precision.bytes()) as f64;
    (kind.to_owned(), Cost { bytes, ..Cost::default() })
}

/// The arrangement of weights for a product.
pub(crate) fn packing(g: &Geometry, precision: Precision) -> (String, Cost) {
    let bytes =
        (g.weights_len() * size_of::<f32>() + g.packed_len(precision) * precision.bytes()) as f64;
    ("weights, arranged".to_owned(), Cost { bytes, ..Cost::default() })
}
