//! Networks, and the builder that assembles them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Device, Result, bail};
use kernels::{Precision, Variant};

use crate::backend::{Backend, Cpu, Tensors};
use crate::flat::{EntryKind, FlatLayout};
use crate::parameters::{AdamMoments, Gradients, Momenta, Parameters};
use crate::plan::{
    NetworkInput, NetworkOperation, NetworkPlan, Norm, OperationWork, Product, Uses,
};
use crate::{BatchGroups, Statistics, Tape};

/// A convolution without bias; its weights are `<name>.weight`, (O, I, KH, KW).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convolution {
    /// Channels of the output, `O`.
    pub out_channels: usize,
    /// Side of the square kernel, in pixels; 1 to 255.
    pub kernel: usize,
    /// Input pixels from one output pixel to the next, at least 1.
    pub stride: usize,
    /// Zero pixels added on each side, fewer than `kernel`.
    pub padding: usize,
}

/// A batch norm with the residual sum and the ReLU that follow it:
/// `relu((z − mean) · weight / √(variance + ε) + bias + residual)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BatchNorm {
    /// `ε`, added to the variance; above 0.
    pub epsilon: f64,
    /// Weight of the batch's statistics in an update of the running ones, 0 to 1.
    pub momentum: f64,
    /// Whether a ReLU ends it.
    pub relu: bool,
    /// A value of the same shape, added before the ReLU.
    pub residual: Option<Value>,
}

/// A max-pool. Padding counts as −∞; the first of equal maxima gets the gradient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Side of the square window, in pixels; 1 to 16.
    pub kernel: usize,
    /// Input pixels from one window to the next, at least 1.
    pub stride: usize,
    /// Pixels added on each side, at most half the window.
    pub padding: usize,
}

/// The output of an operation of a [`Builder`], which later operations may take as input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Value {
    builder: u64,
    index: usize,
}

/// Assembles a [`Network`], operation by operation.
pub struct Builder {
    id: u64,
    input: NetworkInput,
    blocks: Vec<String>,
    block: Option<usize>,
    operations: Vec<NetworkOperation>,
    channels: Vec<usize>,
    /// Whether a value is a map of pixels, not features.
    maps: Vec<bool>,
    parameters: FlatLayout,
    statistics: FlatLayout,
}

impl Builder {
    /// Begins a network that takes images (N, H, W, `channels`).
    pub fn images(channels: usize) -> Builder {
        Builder::new(NetworkInput::Images(channels), channels, true)
    }

    /// Begins a network that takes features (N, `width`).
    pub fn features(width: usize) -> Builder {
        Builder::new(NetworkInput::Features(width), width, false)
    }

    fn new(input: NetworkInput, channels: usize, map: bool) -> Builder {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Builder {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            input,
            blocks: Vec::new(),
            block: None,
            operations: Vec::new(),
            channels: vec![channels],
            maps: vec![map],
            parameters: FlatLayout::default(),
            statistics: FlatLayout::default(),
        }
    }

    /// The input of the network.
    pub fn input(&self) -> Value {
        Value { builder: self.id, index: 0 }
    }

    /// Begins a block, the unit of mode and of freezing: the operations that follow belong to it. A name
    /// that was used before continues that block.
    pub fn block(&mut self, name: &str) {
        let at = self.blocks.iter().position(|block| block == name);
        self.block = Some(at.unwrap_or_else(|| {
            self.blocks.push(name.to_owned());
            self.blocks.len() - 1
        }));
    }

    /// Adds a convolution without bias. Parameter `<name>.weight` (O, I, KH, KW).
    ///
    /// # Errors
    ///
    /// The input is not a map, a number is out of range, the name is taken, or no block was begun.
    pub fn convolution(&mut self, name: &str, input: Value, c: Convolution) -> Result<Value> {
        let channels = self.map_of(name, input)?;
        let Convolution { out_channels, kernel, stride, padding } = c;
        if out_channels == 0 || !(1..=255).contains(&kernel) || stride == 0 || padding >= kernel {
            bail!(
                "invalid convolution `{name}`: {c:?}; it needs at least 1 channel, a kernel of 1 to \
                 255, a stride of at least 1 and a padding smaller than the kernel"
            )
        }
        let block = self.current_block(name)?;
        let shape = vec![out_channels, channels, kernel, kernel];
        let kind = EntryKind::ConvolutionWeight;
        let weight = self.parameters.push(format!("{name}.weight"), shape, kind, block)?;
        let work = OperationWork::Product(Product {
            kernel,
            stride,
            padding,
            ..Product::linear(weight, None)
        });
        self.push(name, input, work, out_channels, true)
    }

    /// Adds a batch norm over images and pixels, with optional residual sum and ReLU. Parameters
    /// `<name>.weight` and `<name>.bias`, statistics `<name>.running_mean` and
    /// `<name>.running_var`.
    ///
    /// # Errors
    ///
    /// A number is out of range, the residual has other channels, the name is taken, or no block was
    /// begun.
    pub fn batch_norm(&mut self, name: &str, input: Value, b: BatchNorm) -> Result<Value> {
        let index = self.index_of(name, input)?;
        let (channels, map) = (self.channels[index], self.maps[index]);
        if !(b.epsilon > 0. && b.epsilon.is_finite() && (0. ..=1.).contains(&b.momentum)) {
            let BatchNorm { epsilon, momentum, .. } = b;
            bail!(
                "invalid batch norm `{name}`: ε is {epsilon} and momentum {momentum}; ε must be above 0 \
                 and momentum from 0 to 1"
            )
        }
        let residual = b.residual.map(|r| self.index_of(name, r)).transpose()?;
        if let Some(residual) = residual
            && (self.channels[residual], self.maps[residual]) != (channels, map)
        {
            let other = self.channels[residual];
            bail!("`{name}`: the residual has {other} channels but the input {channels}")
        }
        let block = self.current_block(name)?;
        let mut push = |layout: fn(&mut Builder) -> &mut FlatLayout, part: &str, kind| {
            layout(self).push(format!("{name}.{part}"), vec![channels], kind, block)
        };
        let norm = Norm {
            weight: push(|b| &mut b.parameters, "weight", EntryKind::NormWeight)?,
            bias: push(|b| &mut b.parameters, "bias", EntryKind::NormBias)?,
            running_mean: push(|b| &mut b.statistics, "running_mean", EntryKind::RunningMean)?,
            running_variance: push(
                |b| &mut b.statistics,
                "running_var",
                EntryKind::RunningVariance,
            )?,
            epsilon: b.epsilon,
            momentum: b.momentum,
            relu: b.relu,
            residual,
        };
        self.push(name, input, OperationWork::BatchNorm(norm), channels, map)
    }

    /// Adds `max(x, 0)`, with slope 0 at 0. After a batch norm, set [`BatchNorm::relu`] instead, which is
    /// cheaper.
    pub fn relu(&mut self, input: Value) -> Result<Value> {
        let index = self.index_of("relu", input)?;
        self.push("relu", input, OperationWork::Relu, self.channels[index], self.maps[index])
    }

    /// Adds a max-pool.
    ///
    /// # Errors
    ///
    /// The input is not a map, a number is out of range, or no block was begun.
    pub fn max_pool(&mut self, input: Value, p: Pool) -> Result<Value> {
        let channels = self.map_of("max-pool", input)?;
        let Pool { kernel, stride, padding } = p;
        if !(1..=16).contains(&kernel) || stride == 0 || padding > kernel / 2 {
            bail!(
                "invalid max-pool: {p:?}; it needs a window of 1 to 16, a stride of at least 1 and a \
                 padding of at most half the window"
            )
        }
        self.push(
            "max-pool",
            input,
            OperationWork::MaxPool { kernel, stride, padding },
            channels,
            true,
        )
    }

    /// Adds the mean over all pixels, which turns a map into features.
    ///
    /// # Errors
    ///
    /// The input is not a map, or no block was begun.
    pub fn global_average_pool(&mut self, input: Value) -> Result<Value> {
        let channels = self.map_of("global average pool", input)?;
        self.push("global average pool", input, OperationWork::AveragePool, channels, false)
    }

    /// Adds a linear layer with bias: `x · weightᵀ + bias`. Parameters `<name>.weight` (O, I) and
    /// `<name>.bias`.
    ///
    /// # Errors
    ///
    /// The input is not features, the width is 0, the name is taken, or no block was begun.
    pub fn linear(&mut self, name: &str, input: Value, width: usize) -> Result<Value> {
        let index = self.index_of(name, input)?;
        let inputs = self.channels[index];
        if self.maps[index] {
            bail!("the linear layer `{name}` takes features but its input is a map; pool it first")
        }
        if width == 0 {
            bail!("the linear layer `{name}` has width 0; it must be at least 1")
        }
        let block = self.current_block(name)?;
        let kind = EntryKind::LinearWeight;
        let shape = vec![width, inputs];
        let weight = self.parameters.push(format!("{name}.weight"), shape, kind, block)?;
        let kind = EntryKind::LinearBias;
        let bias = self.parameters.push(format!("{name}.bias"), vec![width], kind, block)?;
        let work = OperationWork::Product(Product::linear(weight, Some(bias)));
        self.push(name, input, work, width, false)
    }

    /// Finishes the network, with these features as its output.
    ///
    /// # Errors
    ///
    /// The output is a map, the input has no channel, or `ASSORT_KERNEL` names kernels that this
    /// processor cannot run.
    pub fn finish(self, output: Value) -> Result<Network> {
        match Variant::selected() {
            Ok(variant) => self.finish_with(output, variant),
            Err(error) => bail!("{error}"),
        }
    }

    /// [`finish`](Self::finish) with these CPU kernels, to compare them with others.
    ///
    /// # Errors
    ///
    /// The output is a map, or the input has no channel.
    pub fn finish_with(self, output: Value, variant: Variant) -> Result<Network> {
        let output = self.index_of("output", output)?;
        if self.maps[output] {
            bail!("the output is a map of pixels but a network ends in features; pool it first")
        }
        if self.channels[0] == 0 {
            bail!("the input has no channel")
        }
        let Uses { last_use, feeds_norm } = Uses::of(&self.operations, self.channels.len(), output);
        Ok(Network(Arc::new(NetworkPlan {
            input: self.input,
            blocks: self.blocks,
            operations: self.operations,
            channels: self.channels,
            output,
            parameters: Arc::new(self.parameters),
            statistics: Arc::new(self.statistics),
            variant,
            backend: Backend::Cpu(Cpu::new(variant, Precision::F32)),
            last_use,
            feeds_norm,
        })))
    }

    fn push(
        &mut self,
        name: &str,
        input: Value,
        work: OperationWork,
        channels: usize,
        map: bool,
    ) -> Result<Value> {
        let input = self.index_of(name, input)?;
        let block = self.current_block(name)?;
        let output = self.channels.len();
        self.channels.push(channels);
        self.maps.push(map);
        self.operations.push(NetworkOperation {
            name: name.to_owned(),
            block,
            input,
            output,
            work,
        });
        Ok(Value { builder: self.id, index: output })
    }

    fn current_block(&self, name: &str) -> Result<usize> {
        match self.block {
            Some(block) => Ok(block),
            None => bail!("`{name}` belongs to no block; call `Builder::block` first"),
        }
    }

    fn index_of(&self, name: &str, value: Value) -> Result<usize> {
        if value.builder != self.id {
            bail!("the input of `{name}` is a value of another builder")
        }
        Ok(value.index)
    }

    /// The channels of a value, which must be a map.
    fn map_of(&self, name: &str, value: Value) -> Result<usize> {
        let index = self.index_of(name, value)?;
        if !self.maps[index] {
            bail!("`{name}` takes a map of pixels but its input is features")
        }
        Ok(self.channels[index])
    }
}

/// An immutable plan: blocks of operations, no numbers. Cheap to clone; clones share the memory
/// pool of their tapes.
#[derive(Clone)]
pub struct Network(pub(crate) Arc<NetworkPlan>);

impl Network {
    /// The same network with values and their gradients stored and multiplied in `precision`; a new
    /// network has [`Precision::F32`]. Parameters, their gradients and statistics stay f32, and fit
    /// networks of both precisions.
    pub fn with_precision(&self, precision: Precision) -> Network {
        self.with_backend(self.0.backend.with_precision(precision))
    }

    /// How values and their gradients are stored and multiplied.
    pub fn precision(&self) -> Precision {
        self.0.backend.precision()
    }

    /// The same network on a candle device: by the kernels of this project on the CPU and on CUDA, by
    /// candle's tensor operations elsewhere.
    ///
    /// Inputs, outputs and their gradients are tensors on that device, and so are the parameters,
    /// gradients and statistics that this network makes; [`Parameters::to`] and its like bring over
    /// those of another device.
    pub fn on(&self, device: &Device) -> Network {
        let backend = Backend::of(device, self.0.variant, self.precision());
        // Networks that stay where they are go on sharing memory.
        if backend.id().same(self.0.backend.id()) {
            return self.clone();
        }
        self.with_backend(backend)
    }

    /// The same network by candle's tensor operations alone, on the CPU too, where they are many times
    /// slower than the kernels: to compare the two.
    pub fn by_tensor_operations(&self, device: &Device) -> Network {
        self.with_backend(Backend::Tensors(Tensors::new(device, self.precision())))
    }

    /// The same network, whose passes in training divide a batch into these groups: see
    /// [`BatchGroups`]. One group changes nothing.
    ///
    /// Inputs, outputs and their gradients have the images of this rank. [`Gradients::reduce`] adds the
    /// gradients of all groups.
    ///
    /// The ranks that share the groups on GPUs of NVIDIA are connected by NCCL where the program is built with
    /// it, else their sums pass through host memory. So all ranks call it, at the same point.
    ///
    /// # Errors
    ///
    /// Some ranks compute on a GPU and some on the CPU, or the GPUs cannot be connected.
    pub fn in_groups(&self, groups: &BatchGroups) -> Result<Network> {
        groups.connect(&self.device())?;
        Ok(self.with_backend(self.0.backend.in_groups(groups)))
    }

    fn with_backend(&self, backend: Backend) -> Network {
        Network(Arc::new(NetworkPlan { backend, ..NetworkPlan::clone(&self.0) }))
    }

    /// The device of inputs, outputs and parameters.
    pub fn device(&self) -> Device {
        self.0.backend.id().device()
    }

    /// New parameters: 0, but 1 for the weights of batch norms.
    pub fn parameters(&self) -> Parameters {
        Parameters::new(&self.0)
    }

    /// New gradients, zero.
    pub fn gradients(&self) -> Gradients {
        Gradients::new(&self.0)
    }

    /// New momenta for [`Parameters::sgd`], zero.
    pub fn momenta(&self) -> Momenta {
        Momenta::new(&self.0)
    }

    /// New moments for [`Parameters::adam`], zero, with no step counted.
    pub fn adam_moments(&self) -> AdamMoments {
        AdamMoments::new(&self.0)
    }

    /// New running statistics: means 0, variances 1.
    pub fn statistics(&self) -> Statistics {
        Statistics::new(&self.0)
    }

    /// An empty tape.
    pub fn tape(&self) -> Tape {
        Tape::default()
    }

    /// The names of the blocks, from the input on.
    pub fn blocks(&self) -> &[String] {
        &self.0.blocks
    }

    /// The width of the output, `D`.
    pub fn output_width(&self) -> usize {
        self.0.channels[self.0.output]
    }
}
