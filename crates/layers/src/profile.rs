//! Profile of the CPU kernels: the time of a step by kind of layer × pass.
//!
//! [`record`] switches the clocks on for the whole process; otherwise an operation only reads a flag.
//! Operations run one after the other, each on all threads, so their times add up. Groups of a batch run side by
//! side: their times overlap, and add up to more than the time that passes.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use kernels::convolution::{Geometry, Packing};
use kernels::{Precision, Shape};

use crate::Network;

/// The cost of all operations of one kind and pass.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OperationCost {
    /// How often they ran.
    pub count: usize,
    /// Seconds.
    pub seconds: f64,
    /// Floating-point operations of products, two for each multiplication. Those with padding are not
    /// counted. A 3×3 convolution counts as the plain sum, though most compute less than half of its
    /// products (Winograd's form), so that their share of the peak may exceed 100 %. 0 for operations
    /// other than products.
    pub operations: f64,
    /// Bytes of all values read and written, each value counted once.
    pub bytes: f64,
}

/// The result of [`record`]: a row for each kind of operation and pass.
pub type CostRows = Vec<(String, Pass, OperationCost)>;

/// [`CostRows`] as text: milliseconds per step, share of the total, rate and share of the processor's peak of
/// products, bytes moved.
pub struct ProfileTable<'a> {
    /// The recorded rows.
    pub rows: &'a CostRows,
    /// Number of recorded steps.
    pub steps: usize,
    /// A network with the recorded kernels and precision.
    pub network: &'a Network,
}

impl fmt::Display for ProfileTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ProfileTable { rows, steps, network } = *self;
        let (variant, threads) = (network.0.variant, kernels::threads());
        let peak = kernels::peak(variant, network.precision(), threads);
        write!(f, "{variant} kernels, {threads} threads")?;
        if let Some(peak) = peak {
            write!(f, ", peak of products {:.0} GFLOP/s", peak / 1e9)?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "{:20} {:9} {:>5} {:>9} {:>6} {:>7} {:>7} {:>7} {:>6}",
            "layers", "", "times", "ms a step", "share", "GFLOP/s", "of peak", "MB", "GB/s"
        )?;
        let all: f64 = rows.iter().map(|(_, _, cost)| cost.seconds).sum();
        for (kind, pass, cost) in rows {
            let OperationCost { count, seconds, operations, bytes } = *cost;
            let (rate, steps) = (operations / seconds, steps as f64);
            let (mut product, mut of_peak) = (String::new(), String::new());
            if operations > 0. {
                write!(product, "{:.0}", rate / 1e9)?;
                if let Some(peak) = peak {
                    write!(of_peak, "{:.0} %", 100. * rate / peak)?;
                }
            }
            writeln!(
                f,
                "{kind:20} {:9} {:5.0} {:9.2} {:4.1} % {product:>7} {of_peak:>7} {:7.0} {:6.1}",
                format!("{pass:?}").to_lowercase(),
                count as f64 / steps,
                1e3 * seconds / steps,
                100. * seconds / all,
                bytes / steps / 1e6,
                bytes / seconds / 1e9
            )?;
        }
        writeln!(f, "{:36} {:9.2}", "all", 1e3 * all / steps as f64)
    }
}

/// The pass of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// From input to output.
    Forward,
    /// The gradient of the input.
    Backward,
    /// The gradient of the weights.
    Weights,
}

type Totals = BTreeMap<(String, Pass), OperationCost>;

static ON: AtomicBool = AtomicBool::new(false);
static TABLE: Mutex<Totals> = Mutex::new(Totals::new());

/// Runs `work` with the clocks on and returns its cost. Operations that run on other threads in the
/// meantime are counted too.
pub fn record(work: impl FnOnce()) -> CostRows {
    *TABLE.lock().unwrap_or_else(PoisonError::into_inner) = Totals::new();
    ON.store(true, Ordering::Relaxed);
    work();
    ON.store(false, Ordering::Relaxed);
    let table = std::mem::take(&mut *TABLE.lock().unwrap_or_else(PoisonError::into_inner));
    table.into_iter().map(|((kind, pass), cost)| (kind, pass, cost)).collect()
}

/// Starts the clock of one operation, if [`record`] is running.
pub(crate) fn start() -> Option<Instant> {
    ON.load(Ordering::Relaxed).then(Instant::now)
}

/// Stops the clock of one operation; `cost` returns its kind and its cost without the time.
pub(crate) fn stop(
    clock: Option<Instant>,
    pass: Pass,
    cost: impl FnOnce() -> (String, OperationCost),
) {
    let Some(start) = clock else { return };
    let seconds = start.elapsed().as_secs_f64();
    let (kind, cost) = cost();
    let mut table = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
    let total = table.entry((kind, pass)).or_default();
    total.count += 1;
    total.seconds += seconds;
    total.operations += cost.operations;
    total.bytes += cost.bytes;
}

/// The cost of a product: both values and the weights.
pub(crate) fn product(g: &Geometry, precision: Precision) -> (String, OperationCost) {
    let kind = if g.input.pixels() == 1 && g.kernel == 1 {
        "linear".to_owned()
    } else {
        let Geometry { kernel, stride, .. } = g;
        let few = if g.input.channels <= 4 { ", stem" } else { "" };
        format!("{kernel}x{kernel}/{stride}{few}")
    };
    let values = g.input.len() + g.output.len() + g.weights_len();
    let operations = 2. * g.multiplications() as f64;
    (
        kind,
        OperationCost {
            operations,
            bytes: (values * precision.bytes()) as f64,
            ..OperationCost::default()
        },
    )
}

/// The cost of an operation that passes over a value of this shape so many times.
pub(crate) fn passes(
    kind: &str,
    shape: Shape,
    precision: Precision,
    times: usize,
) -> (String, OperationCost) {
    let bytes = (times * shape.len() * precision.bytes()) as f64;
    (kind.to_owned(), OperationCost { bytes, ..OperationCost::default() })
}

/// The cost of packing weights.
pub(crate) fn packing(packing: &Packing) -> (String, OperationCost) {
    let bytes = (packing.weights_len() * size_of::<f32>() + packing.packed_bytes()) as f64;
    ("weights, packed".to_owned(), OperationCost { bytes, ..OperationCost::default() })
}
