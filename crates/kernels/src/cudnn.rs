//! Convolutions by cuDNN on CUDA: channels last, in bf16 or f32, with sums in f32.
//!
//! Products of f32 use TF32 (10 bits of mantissa) on cards that have it, like PyTorch's convolutions. cuDNN
//! predicts its fastest algorithm, once per shape, thread and stream. The workspace is kept and grows when a
//! shape needs more.
//!
//! A length that does not match the geometry is an error.
//!
//! Compiled and type-checked, but not yet run on a GPU.

use std::cell::RefCell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use cudarc::cudnn::sys::{
    cudnnConvolutionBwdDataAlgo_t as DataAlgorithm,
    cudnnConvolutionBwdFilterAlgo_t as FilterAlgorithm,
    cudnnConvolutionFwdAlgo_t as ForwardAlgorithm, cudnnConvolutionMode_t as Mode,
    cudnnMathType_t as Math, cudnnTensorFormat_t as Format,
};
use cudarc::cudnn::{
    ConvBackwardData, ConvBackwardFilter, ConvDescriptor, ConvForward, Cudnn, CudnnDataType,
    FilterDescriptor, TensorDescriptor,
};
use cudarc::driver::{CudaSlice, CudaStream, CudaView};

use crate::Shape;
use crate::convolution::Geometry;
use crate::cuda::{CudaElement, Result};

/// A type of the numbers in convolutions.
pub trait CudnnElement: CudaElement + CudnnDataType {
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// The units that multiply.
    const MATH: Math;
}

impl CudnnElement for f32 {
    const ZERO: f32 = 0.;
    const ONE: f32 = 1.;
    const MATH: Math = Math::CUDNN_DEFAULT_MATH;
}

impl CudnnElement for half::bf16 {
    const ZERO: half::bf16 = half::bf16::ZERO;
    const ONE: half::bf16 = half::bf16::ONE;
    const MATH: Math = Math::CUDNN_TENSOR_OP_MATH;
}

/// The output (N, H', W', O) of a convolution.
///
/// - `input`: (N, H, W, I); `weight`: (O, KH, KW, I).
pub fn forward<T: CudnnElement>(
    stream: &Arc<CudaStream>,
    g: &Geometry,
    input: &CudaView<T>,
    weight: &CudaView<T>,
) -> Result<CudaSlice<T>> {
    check("input", input.len(), numbers(g.input))?;
    check("weight", weight.len(), g.weights_len())?;
    with_context(stream, |context| {
        let d = Descriptors::<T>::new(&context.cudnn, g)?;
        let work = ConvForward { conv: &d.convolution, x: &d.input, w: &d.weight, y: &d.output };
        let (algorithm, bytes) = match context.forward.get(&key::<T>(g)) {
            Some(known) => *known,
            None => {
                let algorithm = work.pick_algorithm()?;
                let found = (algorithm, work.get_workspace_size(algorithm)?);
                context.forward.insert(key::<T>(g), found);
                found
            }
        };
        let workspace = context.workspace(stream, bytes)?;
        // SAFETY: cuDNN writes every number of the output, since the old ones have factor 0.
        let mut output = unsafe { stream.alloc::<T>(numbers(g.output))? };
        // SAFETY: the descriptors are those of the geometry that the lengths were checked against.
        unsafe {
            work.launch(algorithm, workspace, (T::ONE, T::ZERO), input, weight, &mut output)?;
        }
        Ok(output)
    })
}

/// The gradient (N, H, W, I) of a convolution's input.
///
/// - `gradient`: of the output, (N, H', W', O); `weight`: (O, KH, KW, I).
pub fn input_gradient<T: CudnnElement>(
    stream: &Arc<CudaStream>,
    g: &Geometry,
    gradient: &CudaView<T>,
    weight: &CudaView<T>,
) -> Result<CudaSlice<T>> {
    check("gradient", gradient.len(), numbers(g.output))?;
    check("weight", weight.len(), g.weights_len())?;
    with_context(stream, |context| {
        let d = Descriptors::<T>::new(&context.cudnn, g)?;
        let work =
            ConvBackwardData { conv: &d.convolution, dx: &d.input, w: &d.weight, dy: &d.output };
        let (algorithm, bytes) = match context.input_gradient.get(&key::<T>(g)) {
            Some(known) => *known,
            None => {
                let algorithm = work.pick_algorithm()?;
                let found = (algorithm, work.get_workspace_size(algorithm)?);
                context.input_gradient.insert(key::<T>(g), found);
                found
            }
        };
        let workspace = context.workspace(stream, bytes)?;
        // SAFETY: cuDNN writes every number of the result, since the old ones have factor 0.
        let mut result = unsafe { stream.alloc::<T>(numbers(g.input))? };
        // SAFETY: the descriptors are those of the geometry that the lengths were checked against.
        unsafe {
            work.launch(algorithm, workspace, (T::ONE, T::ZERO), &mut result, weight, gradient)?;
        }
        Ok(result)
    })
}

/// The gradient (O, KH, KW, I) of a convolution's weights.
///
/// - `input`: (N, H, W, I); `gradient`: of the output, (N, H', W', O).
pub fn weight_gradient<T: CudnnElement>(
    stream: &Arc<CudaStream>,
    g: &Geometry,
    input: &CudaView<T>,
    gradient: &CudaView<T>,
) -> Result<CudaSlice<T>> {
    check("input", input.len(), numbers(g.input))?;
    check("gradient", gradient.len(), numbers(g.output))?;
    with_context(stream, |context| {
        let d = Descriptors::<T>::new(&context.cudnn, g)?;
        let work =
            ConvBackwardFilter { conv: &d.convolution, x: &d.input, dw: &d.weight, dy: &d.output };
        let (algorithm, bytes) = match context.weight_gradient.get(&key::<T>(g)) {
            Some(known) => *known,
            None => {
                let algorithm = work.pick_algorithm()?;
                let found = (algorithm, work.get_workspace_size(algorithm)?);
                context.weight_gradient.insert(key::<T>(g), found);
                found
            }
        };
        let workspace = context.workspace(stream, bytes)?;
        // SAFETY: cuDNN writes every number of the result, since the old ones have factor 0.
        let mut result = unsafe { stream.alloc::<T>(g.weights_len())? };
        // SAFETY: the descriptors are those of the geometry that the lengths were checked against.
        unsafe {
            work.launch(algorithm, workspace, (T::ONE, T::ZERO), input, &mut result, gradient)?;
        }
        Ok(result)
    })
}

fn check(what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(format!("the {what} of the convolution has {found} numbers, but {expected} are expected")
        .into())
}

/// The count of numbers of a value, without padding.
fn numbers(shape: Shape) -> usize {
    shape.count() * shape.channels
}

/// A geometry, and whether its numbers are bf16.
type CudnnKey = (Geometry, bool);

fn key<T>(g: &Geometry) -> CudnnKey {
    (*g, size_of::<T>() == 2)
}

/// The state of one thread for one stream.
struct CudnnContext {
    cudnn: Arc<Cudnn>,
    workspace: Option<CudaSlice<u8>>,
    /// By shape: the algorithm, and the bytes of its workspace.
    forward: HashMap<CudnnKey, (ForwardAlgorithm, usize)>,
    input_gradient: HashMap<CudnnKey, (DataAlgorithm, usize)>,
    weight_gradient: HashMap<CudnnKey, (FilterAlgorithm, usize)>,
}

impl CudnnContext {
    fn new(stream: &Arc<CudaStream>) -> Result<CudnnContext> {
        Ok(CudnnContext {
            cudnn: Cudnn::new(Arc::clone(stream))?,
            workspace: None,
            forward: HashMap::new(),
            input_gradient: HashMap::new(),
            weight_gradient: HashMap::new(),
        })
    }

    /// A workspace of at least this many bytes, with arbitrary contents.
    fn workspace(
        &mut self,
        stream: &Arc<CudaStream>,
        bytes: usize,
    ) -> Result<Option<&mut CudaSlice<u8>>> {
        if self.workspace.as_ref().map_or(0, CudaSlice::len) < bytes {
            self.workspace = None; // Freed first, so that both need not fit.
            // SAFETY: cuDNN reads only what it has written to its workspace.
            self.workspace = Some(unsafe { stream.alloc::<u8>(bytes)? });
        }
        Ok(self.workspace.as_mut())
    }
}

thread_local! {
    // By card index and address of the stream, which the handle keeps alive. A handle belongs to one
    // thread.
    static CONTEXTS: RefCell<HashMap<(usize, usize), CudnnContext>> = RefCell::default();
}

fn with_context<R>(
    stream: &Arc<CudaStream>,
    f: impl FnOnce(&mut CudnnContext) -> Result<R>,
) -> Result<R> {
    CONTEXTS.with_borrow_mut(|contexts| {
        let key = (stream.context().ordinal(), stream.cu_stream() as usize);
        match contexts.entry(key) {
            Entry::Occupied(known) => f(known.into_mut()),
            Entry::Vacant(place) => f(place.insert(CudnnContext::new(stream)?)),
        }
    })
}

/// The cuDNN descriptors of a convolution.
struct Descriptors<T> {
    convolution: ConvDescriptor<f32>,
    input: TensorDescriptor<T>,
    weight: FilterDescriptor<T>,
    output: TensorDescriptor<T>,
}

impl<T: CudnnElement> Descriptors<T> {
    fn new(cudnn: &Arc<Cudnn>, g: &Geometry) -> Result<Self> {
        let number = i32::try_from;
        let same = |side: usize| -> Result<[i32; 2]> { Ok([number(side)?; 2]) };
        let mode = Mode::CUDNN_CROSS_CORRELATION;
        let mut convolution =
            cudnn.create_conv2d::<f32>(same(g.padding)?, same(g.stride)?, [1, 1], mode)?;
        convolution.set_math_type(T::MATH)?;
        let value = |s: Shape| -> Result<TensorDescriptor<T>> {
            let sides = [s.images, s.channels, s.height, s.width].map(number);
            let [n, c, h, w] = sides;
            Ok(cudnn.create_4d_tensor(Format::CUDNN_TENSOR_NHWC, [n?, c?, h?, w?])?)
        };
        let [o, i, k] = [g.output.channels, g.input.channels, g.kernel].map(number);
        let (o, i, k) = (o?, i?, k?);
        let weight = cudnn.create_4d_filter(Format::CUDNN_TENSOR_NHWC, [o, i, k, k])?;
        Ok(Descriptors { convolution, input: value(g.input)?, weight, output: value(g.output)? })
    }
}
