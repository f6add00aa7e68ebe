//! Backends: implementations of the operations of a network.
//!
//! | backend | computes with | a value is |
//! |---|---|---|
//! | [`Cpu`] | the kernels of the crate `kernels` | a buffer of tiles |
//! | [`Tensors`] | candle's tensor operations, on any of its devices | a tensor (N, H·W, C) |
//! | `Cuda` | fused kernels for batch norm and updates, cuDNN for convolutions, tensor operations for the rest | a tensor (N, H·W, C) |
//! | [`Grouped`] | one of these, once for each group of a batch | its value for each group |
//!
//! `forward.rs` and `backward.rs` walk a plan once for all of them, through the trait
//! [`Operations`]. Parameters, gradients, optimizer memory and statistics are stored in the
//! [`Storage`] of one backend; mixing two backends is an error that names both.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod grouped;
mod storage;
mod tensors;

use std::fmt;

use candle_core::{Device, Result, Tensor};
use kernels::convolution::Geometry;
use kernels::pooling::Window;
use kernels::{Precision, Shape, Variant};

pub(crate) use cpu::Cpu;
#[cfg(feature = "cuda")]
pub(crate) use cuda::Cuda;
#[cfg(feature = "nccl")]
pub(crate) use cuda::exchange as cuda_exchange;
pub(crate) use grouped::Grouped;
pub(crate) use storage::Storage;
pub(crate) use tensors::{DeviceVector, Tensors};

use crate::flat::Changes;
use crate::plan::{Norm, Product};
use crate::{BatchGroups, Parameters};

/// The implementation that computes a network.
#[derive(Clone)]
pub(crate) enum Backend {
    Cpu(Cpu),
    Tensors(Tensors),
    #[cfg(feature = "cuda")]
    Cuda(Cuda),
    GroupedCpu(Grouped<Cpu>),
    GroupedTensors(Grouped<Tensors>),
    #[cfg(feature = "cuda")]
    GroupedCuda(Grouped<Cuda>),
}

impl Backend {
    /// The fastest backend for a device: kernels on the CPU and on CUDA, tensor operations elsewhere.
    pub fn of(device: &Device, variant: Variant, precision: Precision) -> Backend {
        match device {
            Device::Cpu => Backend::Cpu(Cpu::new(variant, precision)),
            #[cfg(feature = "cuda")]
            Device::Cuda(_) => Backend::Cuda(Cuda::new(device, precision)),
            _ => Backend::Tensors(Tensors::new(device, precision)),
        }
    }

    /// The same backend without groups.
    pub fn whole(&self) -> Backend {
        match self {
            Backend::GroupedCpu(grouped) => Backend::Cpu(grouped.backend.clone()),
            Backend::GroupedTensors(grouped) => Backend::Tensors(grouped.backend.clone()),
            #[cfg(feature = "cuda")]
            Backend::GroupedCuda(grouped) => Backend::Cuda(grouped.backend.clone()),
            whole => whole.clone(),
        }
    }

    /// The same backend over these groups of a batch.
    pub fn in_groups(&self, groups: &BatchGroups) -> Backend {
        let groups = groups.clone();
        match self.whole() {
            whole if groups.is_one() => whole,
            Backend::Cpu(backend) => Backend::GroupedCpu(Grouped { backend, groups }),
            Backend::Tensors(backend) => Backend::GroupedTensors(Grouped { backend, groups }),
            #[cfg(feature = "cuda")]
            Backend::Cuda(backend) => Backend::GroupedCuda(Grouped { backend, groups }),
            _ => unreachable!("a whole backend"),
        }
    }

    /// The groups of a batch, if it is divided.
    pub fn batch_groups(&self) -> Option<&BatchGroups> {
        match self {
            Backend::GroupedCpu(grouped) => Some(&grouped.groups),
            Backend::GroupedTensors(grouped) => Some(&grouped.groups),
            #[cfg(feature = "cuda")]
            Backend::GroupedCuda(grouped) => Some(&grouped.groups),
            _ => None,
        }
    }

    pub fn precision(&self) -> Precision {
        match self.whole() {
            Backend::Tensors(tensors) => tensors.precision,
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => cuda.tensors.precision,
            Backend::Cpu(cpu) => cpu.precision,
            _ => unreachable!("a whole backend"),
        }
    }

    /// The same backend with values in another precision.
    pub fn with_precision(&self, precision: Precision) -> Backend {
        let whole = match self.whole() {
            Backend::Cpu(cpu) => Backend::Cpu(Cpu::new(cpu.variant, precision)),
            Backend::Tensors(tensors) => Backend::Tensors(Tensors { precision, ..tensors }),
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) => {
                Backend::Cuda(Cuda { tensors: Tensors { precision, ..cuda.tensors } })
            }
            _ => unreachable!("a whole backend"),
        };
        match self.batch_groups() {
            Some(groups) => whole.in_groups(groups),
            None => whole,
        }
    }

    /// The groups of a batch on this rank, and the number of ranks.
    pub fn groups(&self) -> (usize, usize) {
        self.batch_groups().map_or((1, 1), |groups| (groups.own(), groups.communicator().size()))
    }

    pub fn ranks(&self) -> usize {
        self.groups().1
    }

    pub fn id(&self) -> BackendId<'_> {
        match self {
            Backend::Cpu(_) | Backend::GroupedCpu(_) => BackendId::Cpu,
            Backend::Tensors(tensors)
            | Backend::GroupedTensors(Grouped { backend: tensors, .. }) => {
                BackendId::Tensors(&tensors.device)
            }
            #[cfg(feature = "cuda")]
            Backend::Cuda(cuda) | Backend::GroupedCuda(Grouped { backend: cuda, .. }) => {
                BackendId::Cuda(&cuda.tensors.device)
            }
        }
    }
}

/// The identity of a backend: its kind and its device. Numbers of different backends never mix.
#[derive(Clone, Copy)]
pub(crate) enum BackendId<'a> {
    Cpu,
    Tensors(&'a Device),
    #[cfg(feature = "cuda")]
    Cuda(&'a Device),
}

impl BackendId<'_> {
    pub fn same(self, other: BackendId) -> bool {
        match (self, other) {
            (BackendId::Cpu, BackendId::Cpu) => true,
            (BackendId::Tensors(a), BackendId::Tensors(b)) => a.same_device(b),
            #[cfg(feature = "cuda")]
            (BackendId::Cuda(a), BackendId::Cuda(b)) => a.same_device(b),
            _ => false,
        }
    }

    pub fn device(self) -> Device {
        match self {
            BackendId::Cpu => Device::Cpu,
            BackendId::Tensors(device) => device.clone(),
            #[cfg(feature = "cuda")]
            BackendId::Cuda(device) => device.clone(),
        }
    }
}

impl fmt::Display for BackendId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BackendId::Cpu => write!(f, "CPU kernels"),
            BackendId::Tensors(device) => write!(f, "tensor operations on {:?}", device.location()),
            #[cfg(feature = "cuda")]
            BackendId::Cuda(device) => write!(f, "CUDA kernels on {:?}", device.location()),
        }
    }
}

/// The operations of a network, forward and backward, on the values of one backend.
///
/// A gradient function takes the `total` of the gradients that other readers of the same value
/// have sent back already, and returns the total with its own share.
pub(crate) trait Operations: Sized {
    /// A value of the network, or the gradient of one.
    type Value;
    /// Sums over a value that a product takes for the batch norm that follows it.
    type Sums;
    /// The data that a batch norm keeps for its backward pass.
    type Normalised;
    /// The pixel of each window with its maximum.
    type Argmax;

    /// Whether products pack their weights first, so that inputs gain by passing each product together.
    const PACKS_WEIGHTS: bool = false;

    /// Whether the backward pass of a batch norm reads its input, and its output.
    fn norm_reads(norm: &Norm) -> [bool; 2];

    /// Whether the backward pass computes the output of a batch norm [again](Self::norm_output) where
    /// it can, in place of keeping it. Only for norms that read their input.
    fn recomputes(_norm: &Norm) -> bool {
        false
    }

    /// Reads a caller's f32 tensor; an error names `what` when it is of another type or device.
    fn load(&self, tensor: &Tensor, shape: Shape, what: &str) -> Result<Self::Value>;

    /// A value as an f32 tensor of these dimensions.
    fn unload(&self, value: &Self::Value, shape: Shape, dimensions: &[usize]) -> Result<Tensor>;

    fn product(&self, call: ProductCall<Self>) -> Result<(Self::Value, Option<Self::Sums>)>;

    /// Adds the gradients of weight and bias to `gradients`.
    fn weight_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        input: &Self::Value,
        gradient: &Self::Value,
        gradients: &mut Changes,
    ) -> Result<()>;

    fn input_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        parameters: &Parameters,
        gradient: &Self::Value,
        total: Option<Self::Value>,
    ) -> Result<Self::Value>;

    /// In batch mode, updates the running statistics too.
    fn batch_norm(
        &self,
        call: NormCall<Self>,
        input: Operand<Self::Value>,
        statistics: &mut Changes,
    ) -> Result<(Self::Value, Self::Normalised)>;

    /// The output of a batch norm that [`recomputes`](Self::recomputes), from its input and what it kept:
    /// the same bits as in the forward pass.
    fn norm_output(
        &self,
        _norm: &Norm,
        _shape: Shape,
        _parameters: &Parameters,
        _input: &Self::Value,
        _normalised: &Self::Normalised,
    ) -> Result<Self::Value> {
        unreachable!("this backend keeps the outputs of batch norms")
    }

    /// Adds the gradients of weight and bias to `gradients`; returns those of the input and of the
    /// residual, as far as they are wanted.
    fn batch_norm_gradients(
        &self,
        call: NormGradientCall<Self>,
        gradient: Self::Value,
        gradients: &mut Changes,
    ) -> Result<[Option<Self::Value>; 2]>;

    fn relu(&self, shape: Shape, input: &Self::Value) -> Result<Self::Value>;

    fn relu_gradient(
        &self,
        shape: Shape,
        output: &Self::Value,
        gradient: Self::Value,
    ) -> Result<Self::Value>;

    fn max_pool(&self, w: &Window, input: &Self::Value) -> Result<(Self::Value, Self::Argmax)>;

    fn max_pool_gradient(
        &self,
        w: &Window,
        argmax: &Self::Argmax,
        gradient: &Self::Value,
        total: Option<Self::Value>,
    ) -> Result<Self::Value>;

    fn average_pool(&self, input_shape: Shape, input: &Self::Value) -> Result<Self::Value>;

    fn average_pool_gradient(
        &self,
        input_shape: Shape,
        gradient: &Self::Value,
        total: Option<Self::Value>,
    ) -> Result<Self::Value>;

    /// `total + gradient`.
    fn add(&self, shape: Shape, gradient: Self::Value, total: Self::Value) -> Result<Self::Value>;
}

/// A product to compute: a convolution or a linear layer with what is folded into it.
pub(crate) struct ProductCall<'a, B: Operations> {
    pub product: &'a Product,
    pub g: Geometry,
    pub parameters: &'a Parameters,
    pub input: &'a B::Value,
    pub residual: Option<&'a B::Value>,
    /// Whether a batch norm in batch mode reads the output next.
    pub sums: bool,
}

/// A batch norm to compute.
pub(crate) struct NormCall<'a, B: Operations> {
    pub norm: &'a Norm,
    pub shape: Shape,
    /// Whether mean and variance are the batch's, or the running ones.
    pub batch: bool,
    pub parameters: &'a Parameters,
    pub residual: Option<&'a B::Value>,
    /// Sums that the preceding product has computed.
    pub sums: Option<B::Sums>,
}

/// A value that an operation reads. Its last reader owns it and may write the output over it.
pub(crate) enum Operand<'a, V> {
    Borrowed(&'a V),
    Owned(V),
}

impl<V> Operand<'_, V> {
    pub fn value(&self) -> &V {
        match self {
            Operand::Borrowed(value) => value,
            Operand::Owned(value) => value,
        }
    }
}

/// A batch norm whose gradients are to be computed.
pub(crate) struct NormGradientCall<'a, B: Operations> {
    pub norm: &'a Norm,
    pub shape: Shape,
    pub parameters: &'a Parameters,
    /// Whether the gradients of weight and bias are wanted.
    pub trained: bool,
    /// Whether the gradient of the input is wanted, and that of the residual.
    pub wanted: [bool; 2],
    pub normalised: &'a B::Normalised,
    /// As far as [`Operations::norm_reads`] asks for them.
    pub input: Option<&'a B::Value>,
    pub output: Option<&'a B::Value>,
}

impl<'a, B: Operations> NormGradientCall<'a, B> {
    /// The norm's output, if a ReLU ends it.
    pub fn relu_output(&self) -> Option<&'a B::Value> {
        self.norm.relu.then(|| self.output.expect("a norm with a ReLU reads its output again"))
    }
}
