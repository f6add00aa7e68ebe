//! Convolutions on CUDA by cuDNN, in place of gathered maps and matrix products.
//!
//! Compiled and type-checked, not yet run on a GPU.

use candle_core::backend::BackendStorage as _;
use candle_core::cuda_backend::CudaDType;
use candle_core::cuda_backend::cudarc::driver::CudaView;
use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, Result, Shape, Tensor, bail};
use kernels::convolution::Geometry;
use kernels::cudnn;

/// Which of a convolution's three products.
#[derive(Clone, Copy, Debug)]
enum Product {
    Forward,
    InputGradient,
    WeightGradient,
}

/// A product of two of a convolution's tensors, channels last, in bf16 or f32.
struct Convolution {
    g: Geometry,
    product: Product,
}

/// (N, H·W, I) by (O, KH, KW, I) to (N, H'·W', O).
pub(super) fn forward(g: &Geometry, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    apply(g, Product::Forward, x, weight)
}

/// (N, H'·W', O) by (O, KH, KW, I) to (N, H·W, I).
pub(super) fn input_gradient(g: &Geometry, gradient: &Tensor, weight: &Tensor) -> Result<Tensor> {
    apply(g, Product::InputGradient, gradient, weight)
}

/// (N, H·W, I) by (N, H'·W', O) to (O, KH, KW, I).
pub(super) fn weight_gradient(g: &Geometry, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    apply(g, Product::WeightGradient, x, gradient)
}

fn apply(g: &Geometry, product: Product, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.contiguous()?.apply_op2_no_bwd(&b.contiguous()?, &Convolution { g: *g, product })
}

impl Convolution {
    fn run<T: CudaDType + cudnn::CudnnElement>(
        &self,
        a: (&CudaStorage, &Layout),
        b: (&CudaStorage, &Layout),
    ) -> Result<CudaStorage> {
        let device = a.0.device.clone();
        let (stream, g) = (device.cuda_stream(), &self.g);
        let (a, b) = (view::<T>(a)?, view::<T>(b)?);
        let made = match self.product {
            Product::Forward => cudnn::forward(&stream, g, &a, &b),
            Product::InputGradient => cudnn::input_gradient(&stream, g, &a, &b),
            Product::WeightGradient => cudnn::weight_gradient(&stream, g, &a, &b),
        };
        match made {
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

impl CustomOp2 for Convolution {
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
        bail!("cuDNN computes on CUDA alone")
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
            Product::Forward => Shape::from((output.images, output.pixels(), output.channels)),
            Product::InputGradient => Shape::from((input.images, input.pixels(), input.channels)),
            Product::WeightGradient => {
                Shape::from((output.channels, kernel, kernel, input.channels))
            }
        };
        Ok((storage, shape))
    }
}
