//! Convolutions by cuDNN.
//!
//! Compiled and type-checked, but not yet run on a GPU.

use candle_core::backend::BackendStorage as _;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::CudaView;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use kernels::convolution::Geometry;
use kernels::cudnn;

/// One of the three products of a convolution.
#[derive(Clone, Copy, Debug)]
enum CudnnProduct {
    Forward,
    InputGradient,
    WeightGradient,
}

/// One product of a convolution: of two tensors, channels last, in bf16 or f32.
struct CudnnConvolution {
    g: Geometry,
    product: CudnnProduct,
}

/// (N, H·W, I) to (N, H'·W', O); `weight` is (O, I, KH, KW) in f32.
pub(super) fn forward(g: &Geometry, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    apply(g, CudnnProduct::Forward, x, &channels_last(g, weight, x.dtype())?)
}

/// The gradient of the input, (N, H·W, I), from that of the output; `weight` is (O, I, KH, KW) in
/// f32.
pub(super) fn input_gradient(g: &Geometry, gradient: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let weight = channels_last(g, weight, gradient.dtype())?;
    apply(g, CudnnProduct::InputGradient, gradient, &weight)
}

/// The gradient of the weights, flat in the order (O, I, KH, KW), f32.
pub(super) fn weight_gradient(g: &Geometry, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let found = apply(g, CudnnProduct::WeightGradient, x, gradient)?;
    found.to_dtype(DType::F32)?.permute((0, 3, 1, 2))?.flatten_all()
}

/// The weights as (O, KH, KW, I).
fn channels_last(g: &Geometry, weight: &Tensor, dtype: DType) -> Result<Tensor> {
    let Geometry { input, output, kernel, .. } = g;
    let weight = weight.reshape((output.channels, input.channels, *kernel, *kernel))?;
    weight.to_dtype(dtype)?.permute((0, 2, 3, 1))?.contiguous()
}

fn apply(g: &Geometry, product: CudnnProduct, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op2_no_bwd(&b.contiguous()?, &CudnnConvolution { g: *g, product })
}

impl CudnnConvolution {
    fn run<T: CudaDType + cudnn::CudnnElement>(
        &self,
        a: (&CudaStorage, &Layout),
        b: (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let device = a.0.device.clone();
        let (stream, g) = (device.cuda_stream(), &self.g);
        let (a, b) = (view::<T>(a)?, view::<T>(b)?);
        let found = match self.product {
            CudnnProduct::Forward => cudnn::forward(&stream, g, &a, &b),
            CudnnProduct::InputGradient => cudnn::input_gradient(&stream, g, &a, &b),
            CudnnProduct::WeightGradient => cudnn::weight_gradient(&stream, g, &a, &b),
        };
        match found {
            Ok(slice) => Ok(CudaStorage::wrap_cuda_slice(slice, device)),
            Err(error) => bail!("cuDNN, {:?} of {g:?}: {error}", self.product),
        }
    }
}

fn view<'a, T: CudaDType>(
    (storage, layout): (&'a CudaStorage, &Layout),
) -> Result<CudaView<'a, T>> {
    match layout.contiguous_offsets() {
        Some((from, to)) => Ok(storage.as_cuda_slice::<T>()?.slice(from..to)),
        None => bail!("cuDNN takes contiguous tensors, not {layout:?}"),
    }
}

impl CustomOp2 for CudnnConvolution {
    fn name(&self) -> &'static str {
        "convolution by cuDNN"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        bail!("cuDNN computes only on CUDA")
    }

    fn cuda_fwd(
        &self,
        a: &CudaStorage,
        a_layout: &Layout,
        b: &CudaStorage,
        b_layout: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let (a, b) = ((a, a_layout), (b, b_layout));
        let storage = match a.0.dtype() {
            DType::F32 => self.run::<f32>(a, b)?,
            DType::BF16 => self.run::<half::bf16>(a, b)?,
            other => bail!("cuDNN takes f32 and bf16 here, not {other:?}"),
        };
        let Geometry { input, output, kernel, .. } = self.g;
        let shape = match self.product {
            CudnnProduct::Forward => Shape::from((output.images, output.pixels(), output.channels)),
            CudnnProduct::InputGradient => {
                Shape::from((input.images, input.pixels(), input.channels))
            }
            CudnnProduct::WeightGradient => {
                Shape::from((output.channels, kernel, kernel, input.channels))
            }
        };
        Ok((storage, shape))
    }
}
