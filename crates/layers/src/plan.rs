//! The plan of a network: its operations in order, and what follows from them.

use std::sync::Arc;

use candle_core::{Result, bail};
use kernels::convolution::Geometry;
use kernels::pooling::Window;
use kernels::{Shape, Variant};

use crate::backend::{Backend, Operations};
use crate::flat::FlatLayout;

/// The input of a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NetworkInput {
    /// (N, H, W, C) with this many channels.
    Images(usize),
    /// (N, D) with this width.
    Features(usize),
}

/// One operation: reads `input` (and perhaps a residual), writes `output`.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct NetworkOperation {
    pub name: String,
    pub block: usize,
    pub input: usize,
    pub output: usize,
    pub work: OperationWork,
}

/// The kind of an operation. Numbers are indices of entries in the layouts, or of values.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum OperationWork {
    Product(Product),
    BatchNorm(Norm),
    Relu,
    MaxPool { kernel: usize, stride: usize, padding: usize },
    AveragePool,
}

/// A convolution without bias, or with kernel 1 and a bias a linear layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Product {
    pub weight: usize,
    pub bias: Option<usize>,
    pub kernel: usize,
    pub stride: usize,
    pub padding: usize,
    /// A value that is added at the end; only in an [`Inference`](crate::Inference).
    pub residual: Option<usize>,
    /// Whether a ReLU ends it; only in an [`Inference`](crate::Inference).
    pub relu: bool,
}

impl Product {
    /// A linear layer, without residual and ReLU.
    pub fn linear(weight: usize, bias: Option<usize>) -> Product {
        Product { weight, bias, kernel: 1, stride: 1, padding: 0, residual: None, relu: false }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Norm {
    pub weight: usize,
    pub bias: usize,
    pub running_mean: usize,
    pub running_variance: usize,
    pub epsilon: f64,
    pub momentum: f64,
    pub relu: bool,
    pub residual: Option<usize>,
}

/// A network without its numbers.
#[derive(Clone)]
pub(crate) struct NetworkPlan {
    pub input: NetworkInput,
    pub blocks: Vec<String>,
    pub operations: Vec<NetworkOperation>,
    /// Channels of each value; value 0 is the input.
    pub channels: Vec<usize>,
    pub output: usize,
    pub parameters: Arc<FlatLayout>,
    pub statistics: Arc<FlatLayout>,
    /// The CPU kernels of this network, kept while it computes on another backend.
    pub variant: Variant,
    pub backend: Backend,
    /// Index of the last operation that reads each value in the forward pass.
    pub last_use: Vec<usize>,
    /// For each value, the block of a batch norm that reads it.
    pub feeds_norm: Vec<Option<usize>>,
}

/// The readers of each value.
pub(crate) struct Uses {
    /// As [`NetworkPlan::last_use`].
    pub last_use: Vec<usize>,
    /// As [`NetworkPlan::feeds_norm`].
    pub feeds_norm: Vec<Option<usize>>,
}

impl Uses {
    pub fn of(operations: &[NetworkOperation], values: usize, output: usize) -> Uses {
        let (mut last_use, mut feeds_norm) = (vec![0; values], vec![None; values]);
        for (at, operation) in operations.iter().enumerate() {
            last_use[operation.input] = at;
            // A value that nothing reads can be freed at once.
            last_use[operation.output] = at;
            let residual = match &operation.work {
                OperationWork::Product(product) => product.residual,
                OperationWork::BatchNorm(norm) => {
                    feeds_norm[operation.input] = Some(operation.block);
                    norm.residual
                }
                OperationWork::Relu
                | OperationWork::MaxPool { .. }
                | OperationWork::AveragePool => None,
            };
            if let Some(residual) = residual {
                last_use[residual] = at;
            }
        }
        last_use[output] = operations.len();
        Uses { last_use, feeds_norm }
    }
}

impl NetworkPlan {
    pub fn find_block(&self, block: &str) -> Result<usize> {
        match self.blocks.iter().position(|name| name == block) {
            Some(at) => Ok(at),
            None => bail!("no block is named `{block}`; the blocks are {}", self.blocks.join(", ")),
        }
    }

    /// Whether no operation before this one belongs to its block: the backward pass then leaves the block.
    pub fn is_first_of_block(&self, at: usize) -> bool {
        let block = self.operations[at].block;
        self.operations[..at].iter().all(|operation| operation.block != block)
    }

    /// The shape of every value for an input of these dimensions.
    pub fn shapes(&self, dimensions: &[usize]) -> Result<Vec<Shape>> {
        let input = match (self.input, dimensions) {
            (NetworkInput::Images(channels), &[n, h, w, c]) if c == channels => {
                Shape::new(n, h, w, c)
            }
            (NetworkInput::Features(width), &[n, d]) if d == width => Shape::features(n, d),
            (NetworkInput::Images(channels), _) => {
                bail!(
                    "the network takes images (N, H, W, {channels}) but the input is {dimensions:?}"
                )
            }
            (NetworkInput::Features(width), _) => {
                bail!("the network takes features (N, {width}) but the input is {dimensions:?}")
            }
        };
        if input.count() == 0 {
            bail!("the input {dimensions:?} is empty")
        }
        let mut shapes = vec![input; self.channels.len()];
        for operation in &self.operations {
            let output = self.output_shape(operation, &shapes)?;
            if output.checked_len().is_none() {
                bail!("the output of `{}`, {output:?}, does not fit into memory", operation.name)
            }
            shapes[operation.output] = output;
        }
        Ok(shapes)
    }

    fn output_shape(&self, operation: &NetworkOperation, shapes: &[Shape]) -> Result<Shape> {
        let input = shapes[operation.input];
        let (name, h, w) = (&operation.name, input.height, input.width);
        match &operation.work {
            OperationWork::Product(_) => match self.geometry(operation, shapes) {
                Some(geometry) => Ok(geometry.output),
                None => bail!("`{name}` leaves no output pixel of {h} × {w} pixels"),
            },
            OperationWork::BatchNorm(norm) => match norm.residual.map(|r| shapes[r]) {
                Some(residual) if residual != input => {
                    bail!("`{name}`: the residual is {residual:?} but the input is {input:?}")
                }
                _ => Ok(input),
            },
            OperationWork::MaxPool { .. } => match self.window(operation, shapes) {
                Some(window) => Ok(window.output),
                None => bail!("no window of a max-pool fits into {h} × {w} pixels"),
            },
            OperationWork::Relu => Ok(input),
            OperationWork::AveragePool => Ok(Shape::features(input.images, input.channels)),
        }
    }

    /// For each value that the tape keeps on this backend, the first operation whose backward pass reads it; `None`
    /// for a value that nothing reads, or that is [computed again](Self::recomputed).
    pub fn kept<B: Operations>(&self) -> Vec<Option<usize>> {
        let mut kept = vec![None; self.channels.len()];
        let recomputed = self.recomputed::<B>();
        for (at, operation) in self.operations.iter().enumerate() {
            for value in read_again::<B>(operation) {
                if recomputed[value].is_none() {
                    kept[value].get_or_insert(at);
                }
            }
        }
        kept
    }

    /// For each value, the batch norm that computes it again in the backward pass on this backend, if one does:
    /// that of a norm whose output is read by products alone.
    pub fn recomputed<B: Operations>(&self) -> Vec<Option<usize>> {
        let mut recomputed = vec![None; self.channels.len()];
        for (at, operation) in self.operations.iter().enumerate() {
            if matches!(&operation.work, OperationWork::BatchNorm(norm) if B::recomputes(norm)) {
                recomputed[operation.output] = Some(at);
            }
        }
        for operation in &self.operations {
            if !matches!(operation.work, OperationWork::Product(_)) {
                read_again::<B>(operation).for_each(|value| recomputed[value] = None);
            }
        }
        recomputed
    }

    /// Whether a record of the other plan is one of this plan: the same operations on values of the
    /// same precision and groups.
    pub fn is_same(&self, other: &NetworkPlan) -> bool {
        self.input == other.input
            && self.channels == other.channels
            && self.operations == other.operations
            && self.output == other.output
            && self.parameters == other.parameters
            && self.backend.precision() == other.backend.precision()
            && self.backend.groups() == other.backend.groups()
    }

    /// The dimensions of the input's tensor.
    pub fn input_dimensions(&self, shape: Shape) -> Vec<usize> {
        let Shape { images, height, width, channels } = shape;
        match self.input {
            NetworkInput::Images(_) => vec![images, height, width, channels],
            NetworkInput::Features(_) => vec![images, channels],
        }
    }

    /// The convolution of a [`OperationWork::Product`] on these shapes, if an output pixel is left.
    pub fn geometry(&self, operation: &NetworkOperation, shapes: &[Shape]) -> Option<Geometry> {
        let OperationWork::Product(Product { kernel, stride, padding, .. }) = operation.work else {
            return None;
        };
        let channels = self.channels[operation.output];
        Geometry::new(shapes[operation.input], channels, kernel, stride, padding)
    }

    /// The windows of a [`OperationWork::MaxPool`] on these shapes, if one fits.
    pub fn window(&self, operation: &NetworkOperation, shapes: &[Shape]) -> Option<Window> {
        let OperationWork::MaxPool { kernel, stride, padding } = operation.work else {
            return None;
        };
        Window::new(shapes[operation.input], kernel, stride, padding)
    }
}

/// The values that the backward pass of an operation reads.
fn read_again<B: Operations>(operation: &NetworkOperation) -> impl Iterator<Item = usize> {
    let [input, output] = match &operation.work {
        OperationWork::Product(_) => [true, false],
        OperationWork::BatchNorm(norm) => B::norm_reads(norm),
        OperationWork::Relu => [false, true],
        OperationWork::MaxPool { .. } | OperationWork::AveragePool => [false, false],
    };
    let read = [(input, operation.input), (output, operation.output)];
    read.into_iter().filter_map(|(read, value)| read.then_some(value))
}
