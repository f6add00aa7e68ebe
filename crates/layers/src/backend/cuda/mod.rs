//! The CUDA backend: fused kernels where a tensor operation at a time would pass over memory again and
//! again, cuDNN for convolutions with the feature `cudnn`, and tensor operations for the rest.
//!
//! Compiled and type-checked. The kernels were tested as C, but not yet on a GPU.

#[cfg(feature = "cudnn")]
mod cudnn;
mod groups;
mod memory;
mod norm;
mod updates;

use candle_core::{Device, Result, Tensor};
use kernels::convolution::Geometry;
use kernels::pooling::Window;
use kernels::{Precision, Shape};

use super::grouped::Divisible;
use super::tensors::convolution::TensorConvolution;
use super::tensors::{self, Tensors};
use super::{NormCall, NormGradientCall, Operand, Operations, ProductCall};
use crate::Parameters;
use crate::flat::Changes;
use crate::plan::{Norm, Product};

#[cfg(feature = "nccl")]
pub(crate) use memory::exchange;
pub(super) use updates::{adam, follow, sgd};

#[derive(Clone)]
pub(crate) struct Cuda {
    pub tensors: Tensors,
}

impl Cuda {
    pub fn new(device: &Device, precision: Precision) -> Cuda {
        Cuda { tensors: Tensors::new(device, precision) }
    }

    fn convolution(&self, g: &Geometry) -> TensorConvolution<'_> {
        TensorConvolution::new(&self.tensors.tables, *g)
    }
}

/// Whether cuDNN computes a product. Linear layers are left to cuBLAS.
#[cfg(feature = "cudnn")]
fn is_for_cudnn(g: &Geometry) -> bool {
    g.input.pixels() > 1
}

impl Operations for Cuda {
    type Value = Tensor;
    type Sums = std::convert::Infallible;
    type Normalised = norm::NormInput;
    /// The tap of each window that held the maximum, u8.
    type Argmax = Tensor;

    fn norm_reads(norm: &Norm) -> [bool; 2] {
        // The input is kept in the note.
        [false, norm.relu]
    }

    fn load(&self, tensor: &Tensor, shape: Shape, what: &str) -> Result<Tensor> {
        self.tensors.load(tensor, shape, what)
    }

    fn unload(&self, value: &Tensor, shape: Shape, dimensions: &[usize]) -> Result<Tensor> {
        self.tensors.unload(value, shape, dimensions)
    }

    fn product(&self, call: ProductCall<Self>) -> Result<(Tensor, Option<Self::Sums>)> {
        let ProductCall { product, g, parameters, input, residual, .. } = call;
        let weight = parameters.tensor(product.weight)?;
        #[cfg(feature = "cudnn")]
        if is_for_cudnn(&g) {
            let sum = cudnn::forward(&g, input, &weight)?;
            return Ok((tensors::finish(sum, product, parameters, residual)?, None));
        }
        let sum = self.convolution(&g).forward(input, &weight)?;
        Ok((tensors::finish(sum, product, parameters, residual)?, None))
    }

    fn weight_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        input: &Tensor,
        gradient: &Tensor,
        gradients: &mut Changes,
    ) -> Result<()> {
        tensors::bias_gradient(product, gradient, gradients)?;
        #[cfg(feature = "cudnn")]
        if is_for_cudnn(g) {
            gradients.push(product.weight, cudnn::weight_gradient(g, input, gradient)?);
            return Ok(());
        }
        gradients.push(product.weight, self.convolution(g).weight_gradient(input, gradient)?);
        Ok(())
    }

    fn input_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        parameters: &Parameters,
        gradient: &Tensor,
        total: Option<Tensor>,
    ) -> Result<Tensor> {
        let weight = parameters.tensor(product.weight)?;
        #[cfg(feature = "cudnn")]
        if is_for_cudnn(g) {
            return tensors::add_to(total, cudnn::input_gradient(g, gradient, &weight)?);
        }
        tensors::add_to(total, self.convolution(g).input_gradient(gradient, &weight)?)
    }

    fn batch_norm(
        &self,
        call: NormCall<Self>,
        input: Operand<Tensor>,
        statistics: &mut Changes,
    ) -> Result<(Tensor, norm::NormInput)> {
        let NormCall { norm, parameters, residual, batch, .. } = call;
        let input = input.value();
        let (weight, bias) = (parameters.tensor(norm.weight)?, parameters.tensor(norm.bias)?);
        let [mean, variance] = [norm.running_mean, norm.running_variance];
        let running = [statistics.tensor(mean)?, statistics.tensor(variance)?];
        let found =
            norm::normalise(norm, input, residual, [&weight, &bias], running.each_ref(), batch)?;
        for (entry, running) in
            [mean, variance].into_iter().zip(found.running.into_iter().flatten())
        {
            statistics.push(entry, running);
        }
        Ok((found.y, found.note))
    }

    fn batch_norm_gradients(
        &self,
        call: NormGradientCall<Self>,
        mut gradient: Tensor,
        gradients: &mut Changes,
    ) -> Result<[Option<Tensor>; 2]> {
        let sums = self.gradient_sums(&call, &mut gradient)?;
        if call.trained {
            Self::norm_weight_gradients(&call, &sums, gradients)?;
        }
        self.norm_value_gradients(&call, &sums, gradient)
    }

    fn relu(&self, shape: Shape, input: &Tensor) -> Result<Tensor> {
        self.tensors.relu(shape, input)
    }

    fn relu_gradient(&self, shape: Shape, output: &Tensor, gradient: Tensor) -> Result<Tensor> {
        self.tensors.relu_gradient(shape, output, gradient)
    }

    fn max_pool(&self, w: &Window, input: &Tensor) -> Result<(Tensor, Tensor)> {
        self.tensors.max_pool(w, input)
    }

    fn max_pool_gradient(
        &self,
        w: &Window,
        argmax: &Tensor,
        gradient: &Tensor,
        total: Option<Tensor>,
    ) -> Result<Tensor> {
        self.tensors.max_pool_gradient(w, argmax, gradient, total)
    }

    fn average_pool(&self, shape: Shape, input: &Tensor) -> Result<Tensor> {
        self.tensors.average_pool(shape, input)
    }

    fn average_pool_gradient(
        &self,
        input_shape: Shape,
        gradient: &Tensor,
        total: Option<Tensor>,
    ) -> Result<Tensor> {
        self.tensors.average_pool_gradient(input_shape, gradient, total)
    }

    fn add(&self, shape: Shape, gradient: Tensor, total: Tensor) -> Result<Tensor> {
        self.tensors.add(shape, gradient, total)
    }
}
