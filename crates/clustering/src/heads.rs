//! Several clustering networks of one shape, trained side by side.
//!
//! A network is so small that its operations cost more in calls than in arithmetic. So the first
//! layers of all `R` networks are one matrix, the second ones a batched product, and a step
//! computes all of them at once. They share the images of a batch and nothing else: no weight of
//! one enters the output of another.

use anyhow::Result;
use candle_core::{Device, Tensor, Var};
use training::ops::relu;

use crate::head::{Head, Shape};

/// `R` clustering networks as candle variables.
#[derive(Debug)]
pub struct Heads {
    count: usize,
    shape: Shape,
    /// `(D, R·H)`: the hidden layers beside each other.
    hidden_weight: Var,
    /// `(1, R·H)`.
    hidden_bias: Var,
    /// `(R, H, K)`.
    output_weight: Var,
    /// `(R, 1, K)`.
    output_bias: Var,
}

impl Heads {
    /// Puts networks of one shape side by side.
    ///
    /// # Errors
    ///
    /// `heads` is empty or of several shapes.
    pub fn stack(heads: &[Head], device: &Device) -> Result<Self> {
        let shape = heads.first().map(|head| head.shape);
        let Some(shape) = shape.filter(|shape| heads.iter().all(|head| head.shape == *shape))
        else {
            anyhow::bail!(
                "clustering networks side by side need one shape, and at least one network"
            )
        };
        let Shape { width, hidden, clusters } = shape;
        let count = heads.len();
        let join = |values: fn(&Head) -> &[f32], dims: (usize, usize, usize)| {
            let joined: Vec<f32> = heads.iter().flat_map(values).copied().collect();
            Tensor::from_vec(joined, dims, device)
        };
        let hidden_weight = join(|head| &head.hidden_weight, (1, count * hidden, width))?;
        let output_weight = join(|head| &head.output_weight, (count, clusters, hidden))?;
        Ok(Self {
            count,
            shape,
            hidden_weight: Var::from_tensor(&hidden_weight.squeeze(0)?.t()?.contiguous()?)?,
            hidden_bias: Var::from_tensor(
                &join(|head| &head.hidden_bias, (1, 1, count * hidden))?.squeeze(0)?,
            )?,
            output_weight: Var::from_tensor(&output_weight.transpose(1, 2)?.contiguous()?)?,
            output_bias: Var::from_tensor(&join(|head| &head.output_bias, (count, 1, clusters))?)?,
        })
    }

    /// The networks one by one, as they are now.
    ///
    /// # Errors
    ///
    /// The device fails.
    pub fn unstack(&self) -> Result<Vec<Head>> {
        let Shape { hidden, .. } = self.shape;
        let flat = |tensor: Tensor| tensor.flatten_all()?.to_vec1::<f32>();
        (0..self.count)
            .map(|r| {
                let columns = self.hidden_weight.narrow(1, r * hidden, hidden)?;
                Ok(Head {
                    shape: self.shape,
                    hidden_weight: flat(columns.t()?)?,
                    hidden_bias: flat(self.hidden_bias.narrow(1, r * hidden, hidden)?)?,
                    output_weight: flat(self.output_weight.get(r)?.t()?)?,
                    output_bias: flat(self.output_bias.get(r)?)?,
                })
            })
            .collect()
    }

    /// How many networks `R` there are.
    pub fn count(&self) -> usize {
        self.count
    }

    /// What an optimizer moves.
    pub fn variables(&self) -> Vec<Var> {
        [&self.hidden_weight, &self.hidden_bias, &self.output_weight, &self.output_bias]
            .map(Var::clone)
            .to_vec()
    }

    /// Outputs before the softmax, `(R, B, K)`.
    ///
    /// - `embeddings`: rows of length `√D`, `(B, D)`.
    ///
    /// The biases are added as products with a column of ones: the gradient of such a product is
    /// a product again, where that of a broadcast sum is a slow loop.
    ///
    /// # Errors
    ///
    /// `embeddings` has another width.
    pub fn logits(&self, embeddings: &Tensor) -> Result<Tensor> {
        let (b, _) = embeddings.dims2()?;
        let ones = Tensor::ones((self.count, b, 1), embeddings.dtype(), embeddings.device())?;
        let hidden =
            (embeddings.matmul(&self.hidden_weight)? + ones.get(0)?.matmul(&self.hidden_bias)?)?;
        let hidden = relu(&hidden)?.reshape((b, self.count, self.shape.hidden))?;
        let hidden = hidden.transpose(0, 1)?.contiguous()?;
        Ok((hidden.matmul(&self.output_weight)? + ones.matmul(&self.output_bias)?)?)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device::Cpu;

    use super::*;

    const SHAPE: Shape = Shape { width: 5, hidden: 4, clusters: 3 };

    /// `W₂ relu(W₁ x + b₁) + b₂`, written out.
    fn plain(head: &Head, x: &[f32]) -> Vec<f32> {
        let layer = |weight: &[f32], bias: &[f32], x: &[f32]| -> Vec<f32> {
            let rows = weight.chunks_exact(x.len()).zip(bias);
            rows.map(|(w, b)| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>() + b).collect()
        };
        let hidden: Vec<f32> = layer(&head.hidden_weight, &head.hidden_bias, x)
            .into_iter()
            .map(|h| h.max(0.0))
            .collect();
        layer(&head.output_weight, &head.output_bias, &hidden)
    }

    #[test]
    fn each_network_computes_as_it_would_alone() -> Result<()> {
        let heads = [Head::random(SHAPE, 1, &[0]), Head::random(SHAPE, 1, &[1])];
        let rows = [[0.3f32, -1.2, 0.7, 2.0, 0.1], [-0.4, 0.0, 0.9, 0.2, -0.7]];
        let logits =
            Heads::stack(&heads, &Cpu)?.logits(&Tensor::new(&rows, &Cpu)?)?.to_vec3::<f32>()?;
        for (head, outputs) in heads.iter().zip(&logits) {
            for (row, output) in rows.iter().zip(outputs) {
                for (want, got) in plain(head, row).iter().zip(output) {
                    assert!((want - got).abs() < 1e-6, "got {got}, want {want}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn unstacking_undoes_stacking() -> Result<()> {
        let heads: Vec<Head> = (0..3).map(|i| Head::random(SHAPE, 1, &[i])).collect();
        assert_eq!(Heads::stack(&heads, &Cpu)?.unstack()?, heads);
        assert!(Heads::stack(&[], &Cpu).is_err());
        let wider = Head::random(Shape { hidden: 8, ..SHAPE }, 1, &[0]);
        assert!(Heads::stack(&[heads[0].clone(), wider], &Cpu).is_err());
        Ok(())
    }
}
