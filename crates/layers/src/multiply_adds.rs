//! How much arithmetic a network takes, counted from its plan.

use candle_core::Result;

use crate::Network;
use crate::plan::{NetworkPlan, OperationWork};

/// The multiplications of a network's products, each with its addition. Products with padding, batch
/// norm, ReLU, pooling and the optimizer are not counted.
///
/// A 3×3 convolution counts as the plain sum, also where a kernel computes it by fewer products.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct MultiplyAdds {
    /// From input to output.
    pub forward: f64,
    /// The gradients of the inputs of layers, as far as a trained layer lies below.
    pub input_gradient: f64,
    /// The gradients of the weights of trained layers.
    pub weight_gradient: f64,
}

impl MultiplyAdds {
    /// Forward and backward pass together.
    pub fn learning(&self) -> f64 {
        self.forward + self.input_gradient + self.weight_gradient
    }
}

impl Network {
    /// Counts the arithmetic of one pass over an input of these dimensions, `[N, H, W, C]` or
    /// `[N, D]`.
    ///
    /// - `frozen`: blocks that do not learn.
    /// - `input_gradient`: whether the backward pass returns the gradient of the input.
    ///
    /// # Errors
    ///
    /// The network takes no input of these dimensions.
    pub fn multiply_adds(
        &self,
        dimensions: &[usize],
        frozen: &[String],
        input_gradient: bool,
    ) -> Result<MultiplyAdds> {
        let plan = &self.0;
        let shapes = plan.shapes(dimensions)?;
        let is_trained = |block: usize| !frozen.contains(&plan.blocks[block]);
        let needed = needed(plan, is_trained, input_gradient);
        let mut sum = MultiplyAdds::default();
        for operation in &plan.operations {
            let count = match &operation.work {
                OperationWork::Product(_) => match plan.geometry(operation, &shapes) {
                    Some(geometry) => geometry.multiplications() as f64,
                    None => 0.,
                },
                OperationWork::BatchNorm(_)
                | OperationWork::Relu
                | OperationWork::MaxPool { .. }
                | OperationWork::AveragePool => 0.,
            };
            sum.forward += count;
            if needed[operation.input] {
                sum.input_gradient += count;
            }
            if is_trained(operation.block) {
                sum.weight_gradient += count;
            }
        }
        Ok(sum)
    }
}

/// For each value, whether its gradient is needed: for a trained parameter at or below it, or for the
/// input.
pub(crate) fn needed(
    plan: &NetworkPlan,
    is_trained: impl Fn(usize) -> bool,
    input_gradient: bool,
) -> Vec<bool> {
    let mut needed = vec![false; plan.channels.len()];
    needed[0] = input_gradient;
    for operation in &plan.operations {
        let (own, residual) = match &operation.work {
            OperationWork::Product(_) => (true, None),
            OperationWork::BatchNorm(norm) => (true, norm.residual),
            OperationWork::Relu | OperationWork::MaxPool { .. } | OperationWork::AveragePool => {
                (false, None)
            }
        };
        needed[operation.output] = needed[operation.input]
            || residual.is_some_and(|r| needed[r])
            || own && is_trained(operation.block);
    }
    needed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BatchNorm, Builder, Convolution};

    #[test]
    fn products_are_counted_for_each_pass_as_it_runs() -> Result<()> {
        let mut b = Builder::images(3);
        let input = b.input();
        b.block("stem");
        let c = |out_channels, kernel, padding| Convolution {
            out_channels,
            kernel,
            stride: 1,
            padding,
        };
        let x = b.convolution("conv1", input, c(4, 3, 1))?;
        let x = b.batch_norm(
            "bn1",
            x,
            BatchNorm { epsilon: 1e-5, momentum: 0.1, relu: true, residual: None },
        )?;
        b.block("top");
        let x = b.convolution("conv2", x, c(5, 1, 0))?;
        let x = b.global_average_pool(x)?;
        let x = b.linear("fc", x, 7)?;
        let network = b.finish(x)?;
        // 2 pictures of 4 × 5. The 3×3: along a side of n pixels 3n − 2 taps are inside.
        let conv1 = f64::from(2 * (3 * 4 - 2) * (3 * 5 - 2) * 3 * 4);
        let (conv2, fc) = (f64::from(2 * 4 * 5 * 4 * 5), f64::from(2 * 5 * 7));
        let count = |frozen: &[&str], input_gradient| {
            let frozen: Vec<String> = frozen.iter().map(|&name| name.to_owned()).collect();
            network.multiply_adds(&[2, 4, 5, 3], &frozen, input_gradient)
        };
        let all = conv1 + conv2 + fc;
        let want = |input_gradient, weight_gradient| MultiplyAdds {
            forward: all,
            input_gradient,
            weight_gradient,
        };
        assert_eq!(count(&[], false)?, want(conv2 + fc, all));
        assert_eq!(count(&[], true)?, want(all, all));
        assert_eq!(count(&["stem"], false)?, want(fc, conv2 + fc));
        assert_eq!(count(&["stem"], true)?, want(all, conv2 + fc));
        assert_eq!(count(&["stem", "top"], false)?, want(0., 0.));
        assert!(network.multiply_adds(&[2, 4, 5, 1], &[], false).is_err());
        Ok(())
    }
}
