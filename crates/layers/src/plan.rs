//! The operations of a network in order, and what follows from them alone.

use std::sync::Arc;

use candle_core::{Result, bail};
use kernels::convolution::Geometry;
use kernels::pooling::Window;
use kernels::{BufferPool, Precision, Shape, Variant};

use crate::device::Place;
use crate::flat::Layout;

/// What comes in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// (N, H, W, C) with this many channels.
    Images(usize),
    /// (N, D) with this width.
    Features(usize),
}

/// One operation: reads `input` (and perhaps a residual), writes `output`.
#[derive(Clone, Debug)]
pub(crate) struct Operation {
    pub name: String,
    pub block: usize,
    pub input: usize,
    pub output: usize,
    pub work: Work,
}

/// What an operation does; numbers are indices of entries in the layouts.
#[derive(Clone, Debug)]
pub(crate) enum Work {
    /// A convolution without bias, or with kernel 1 and a bias a linear layer.
    Product {
        weight: usize,
        bias: Option<usize>,
        kernel: usize,
        stride: usize,
        padding: usize,
        /// A value that is added at the end; only in an [`Inference`](crate::Inference).
        residual: Option<usize>,
        /// Whether a ReLU ends it; only there, too.
        relu: bool,
    },
    BatchNorm(Norm),
    Relu,
    MaxPool {
        kernel: usize,
        stride: usize,
        padding: usize,
    },
    AveragePool,
}

impl Work {
    /// A product without residual and ReLU.
    pub fn product(
        weight: usize,
        bias: Option<usize>,
        kernel: usize,
        stride: usize,
        padding: usize,
    ) -> Work {
        Work::Product { weight, bias, kernel, stride, padding, residual: None, relu: false }
    }
}

#[derive(Clone, Debug)]
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
pub(crate) struct Plan {
    pub input: Input,
    pub blocks: Vec<String>,
    pub operations: Vec<Operation>,
    /// Channels of each value; value 0 is the input.
    pub channels: Vec<usize>,
    pub output: usize,
    pub parameters: Arc<Layout>,
    pub statistics: Arc<Layout>,
    pub variant: Variant,
    pub precision: Precision,
    pub pool: Arc<BufferPool>,
    /// Where tensor operations of candle's compute; without, the CPU's kernels do.
    pub place: Option<Arc<Place>>,
    /// Index of the last operation that reads each value in the forward pass.
    pub last_use: Vec<usize>,
    /// Whether the backward pass reads the value.
    pub kept: Vec<bool>,
    /// For each value, the block of the one batch norm that takes its statistics, if one does.
    pub feeds_norm: Vec<Option<usize>>,
}

/// Who reads the values of a plan.
pub(crate) struct Uses {
    /// As [`Plan::last_use`].
    pub last_use: Vec<usize>,
    /// As [`Plan::kept`].
    pub kept: Vec<bool>,
    /// As [`Plan::feeds_norm`].
    pub feeds_norm: Vec<Option<usize>>,
}

impl Uses {
    pub fn of(operations: &[Operation], values: usize, output: usize) -> Uses {
        let (mut last_use, mut kept) = (vec![0; values], vec![false; values]);
        let mut feeds_norm = vec![None; values];
        for (at, operation) in operations.iter().enumerate() {
            last_use[operation.input] = at;
            // A value that nothing reads can go at once.
            last_use[operation.output] = at;
            match &operation.work {
                Work::Product { residual, .. } => {
                    kept[operation.input] = true;
                    if let Some(residual) = residual {
                        last_use[*residual] = at;
                    }
                }
                Work::BatchNorm(norm) => {
                    kept[operation.input] = true;
                    // Without a residual the input tells where the ReLU is zero.
                    kept[operation.output] |= norm.relu && norm.residual.is_some();
                    feeds_norm[operation.input] = Some(operation.block);
                    if let Some(residual) = norm.residual {
                        last_use[residual] = at;
                    }
                }
                Work::Relu => kept[operation.output] = true,
                Work::MaxPool { .. } | Work::AveragePool => {}
            }
        }
        last_use[output] = operations.len();
        Uses { last_use, kept, feeds_norm }
    }
}

impl Plan {
    pub fn find_block(&self, block: &str) -> Result<usize> {
        match self.blocks.iter().position(|name| name == block) {
            Some(at) => Ok(at),
            None => bail!("no block is named `{block}`; the blocks are {}", self.blocks.join(", ")),
        }
    }

    /// The shape of every value for an input of these dimensions.
    pub fn shapes(&self, dimensions: &[usize]) -> Result<Vec<Shape>> {
        let input = match (self.input, dimensions) {
            (Input::Images(channels), &[n, h, w, c]) if c == channels => Shape::new(n, h, w, c),
            (Input::Features(width), &[n, d]) if d == width => Shape::features(n, d),
            (Input::Images(channels), _) => {
                bail!(
                    "the network takes images (N, H, W, {channels}) but the input is {dimensions:?}"
                )
            }
            (Input::Features(width), _) => {
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
                bail!("`{}`: a value of {output:?} does not fit into memory", operation.name)
            }
            shapes[operation.output] = output;
        }
        Ok(shapes)
    }

    fn output_shape(&self, operation: &Operation, shapes: &[Shape]) -> Result<Shape> {
        let input = shapes[operation.input];
        let (name, h, w) = (&operation.name, input.height, input.width);
        match &operation.work {
            Work::Product { .. } => match self.geometry(operation, shapes) {
                Some(geometry) => Ok(geometry.output),
                None => bail!("`{name}`: no output pixel is left of {h} × {w} pixels"),
            },
            Work::BatchNorm(norm) => match norm.residual.map(|r| shapes[r]) {
                Some(residual) if residual != input => {
                    bail!("`{name}`: the residual is {residual:?} but the input {input:?}")
                }
                _ => Ok(input),
            },
            Work::MaxPool { .. } => match self.window(operation, shapes) {
                Some(window) => Ok(window.output),
                None => bail!("a max-pool in `{name}`: no window fits into {h} × {w} pixels"),
            },
            Work::Relu => Ok(input),
            Work::AveragePool => Ok(Shape::features(input.images, input.channels)),
        }
    }

    /// The convolution of a [`Work::Product`] on these shapes.
    pub fn geometry(&self, operation: &Operation, shapes: &[Shape]) -> Option<Geometry> {
        let Work::Product { kernel, stride, padding, .. } = operation.work else { return None };
        let channels = self.channels[operation.output];
        Geometry::new(shapes[operation.input], channels, kernel, stride, padding)
    }

    /// The windows of a [`Work::MaxPool`] on these shapes.
    pub fn window(&self, operation: &Operation, shapes: &[Shape]) -> Option<Window> {
        let Work::MaxPool { kernel, stride, padding } = operation.work else { return None };
        Window::new(shapes[operation.input], kernel, stride, padding)
    }
}
