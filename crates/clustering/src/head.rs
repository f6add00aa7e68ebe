//! The clustering network, and its file `head.safetensors`.
//!
//! One hidden layer between an embedding and the memberships of `K` clusters:
//! `p = softmax(W₂ relu(W₁ x + b₁) + b₂)`, where `x` is the backbone's embedding scaled to length
//! `√D`. A unit-length row of 512 values would keep Adam's first steps from having any effect, a
//! raw one would saturate the softmax; at length `√D` its values are of order 1.
//!
//! The file is that of [`data::head`], of form `network`.

use std::path::Path;

use anyhow::{Result, ensure};
use data::head;
use rand::RngExt;
use stage::container::Tensor;

/// Weights of one clustering network.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// Extents: embedding, hidden layer, clusters.
    pub shape: HeadShape,
    /// `W₁`, `(H, D)` row by row.
    pub hidden_weight: Vec<f32>,
    /// `b₁`, `(H,)`.
    pub hidden_bias: Vec<f32>,
    /// `W₂`, `(K, H)` row by row.
    pub output_weight: Vec<f32>,
    /// `b₂`, `(K,)`.
    pub output_bias: Vec<f32>,
}

/// Extents of a clustering network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Width `D` of the embedding.
    pub width: usize,
    /// Width `H` of the hidden layer.
    pub hidden: usize,
    /// Clusters `K`.
    pub clusters: usize,
}

impl Head {
    /// A random network: every weight and bias uniform in `±1/√(inputs of its layer)`.
    ///
    /// `seed` and `counters` name the draw; see [`stage::random`].
    pub fn random(shape: HeadShape, seed: u64, counters: &[u64]) -> Self {
        let mut rng = stage::random::stream(seed, "clustering head", counters);
        let mut uniform = |count: usize, inputs: usize| -> Vec<f32> {
            let bound = 1.0 / (inputs as f32).sqrt();
            (0..count).map(|_| rng.random_range(-bound..bound)).collect()
        };
        let HeadShape { width, hidden, clusters } = shape;
        Self {
            shape,
            hidden_weight: uniform(hidden * width, width),
            hidden_bias: uniform(hidden, width),
            output_weight: uniform(clusters * hidden, hidden),
            output_bias: uniform(clusters, hidden),
        }
    }

    /// Its weights in one list: `W₁`, `b₁`, `W₂`, `b₂`.
    pub fn flat(&self) -> Vec<f32> {
        let hidden = [&*self.hidden_weight, &*self.hidden_bias].concat();
        [&*hidden, &*self.output_weight, &*self.output_bias].concat()
    }

    /// The head of these weights, in the order of [`flat`](Self::flat).
    ///
    /// # Panics
    ///
    /// `weights` are fewer than those of a head of this shape.
    pub fn of_flat(shape: HeadShape, weights: &[f32]) -> Self {
        let mut rest = weights.iter().copied();
        let mut next = |count: usize| -> Vec<f32> { rest.by_ref().take(count).collect() };
        let HeadShape { width, hidden, clusters } = shape;
        Self {
            shape,
            hidden_weight: next(hidden * width),
            hidden_bias: next(hidden),
            output_weight: next(clusters * hidden),
            output_bias: next(clusters),
        }
    }

    /// Renames its clusters: what was cluster `k` becomes `map[k]`.
    pub fn renumber(&mut self, map: &[u32]) {
        let width = self.shape.hidden;
        let (weight, bias) = (self.output_weight.clone(), self.output_bias.clone());
        for (from, &to) in map.iter().enumerate() {
            let to = to as usize;
            self.output_weight[to * width..(to + 1) * width]
                .copy_from_slice(&weight[from * width..(from + 1) * width]);
            self.output_bias[to] = bias[from];
        }
    }

    /// Reads the head in `folder`.
    ///
    /// # Errors
    ///
    /// The file is missing or broken, holds centres in place of a network, or a network of other
    /// extents than `shape`.
    pub fn read(folder: &Path, shape: HeadShape) -> Result<Self> {
        let file = head::open(folder)?;
        let form = file.header_text("form")?;
        ensure!(
            form == "network",
            "`{}` holds {form}, but this round goes on from a network; cluster the last round with \
             `heads` above 0",
            file.path().display()
        );
        let HeadShape { width, hidden, clusters } = shape;
        for (name, want) in [
            ("hidden.weight", vec![hidden, width]),
            ("hidden.bias", vec![hidden]),
            ("output.weight", vec![clusters, hidden]),
            ("output.bias", vec![clusters]),
        ] {
            let found = file.shape(name)?;
            ensure!(
                found == want,
                "`{}`: {name} is {found:?}, but the experiment asks for {want:?}; start the rounds \
                 again, or set `hidden` and `clusters` back",
                file.path().display()
            );
        }
        let tensor = |name| file.f32(name);
        Ok(Self {
            shape,
            hidden_weight: tensor("hidden.weight")?,
            hidden_bias: tensor("hidden.bias")?,
            output_weight: tensor("output.weight")?,
            output_bias: tensor("output.bias")?,
        })
    }

    /// Writes the head into `folder`.
    ///
    /// # Errors
    ///
    /// A weight is not finite, or the file system refuses.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let HeadShape { width, hidden, clusters } = self.shape;
        head::write(
            folder,
            clusters,
            "network",
            &[
                Tensor::f32("hidden.weight", &[hidden, width], &self.hidden_weight),
                Tensor::f32("hidden.bias", &[hidden], &self.hidden_bias),
                Tensor::f32("output.weight", &[clusters, hidden], &self.output_weight),
                Tensor::f32("output.bias", &[clusters], &self.output_bias),
            ],
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: HeadShape = HeadShape { width: 5, hidden: 4, clusters: 3 };

    #[test]
    fn a_head_is_read_as_it_was_written() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let head = Head::random(SHAPE, 1, &[0]);
        head.write(folder.path())?;
        assert_eq!(Head::read(folder.path(), SHAPE)?, head);
        assert_eq!(Head::of_flat(SHAPE, &head.flat()), head);

        let other = HeadShape { hidden: 6, ..SHAPE };
        let error = format!("{:#}", Head::read(folder.path(), other).expect_err("other extents"));
        assert!(error.contains("hidden.weight") && error.contains("[6, 5]"), "{error}");

        head::write_centres(folder.path(), &[0.0; 6], 3, data::head::CentreMetric::Cosine)?;
        let error = format!("{:#}", Head::read(folder.path(), SHAPE).expect_err("no network"));
        assert!(error.contains("centres"), "{error}");
        Ok(())
    }

    #[test]
    fn draws_differ_by_counter_and_stay_in_bounds() {
        let head = Head::random(SHAPE, 1, &[0]);
        assert_ne!(head, Head::random(SHAPE, 1, &[1]));
        assert_ne!(head, Head::random(SHAPE, 2, &[0]));
        let bound = 1.0 / 5f32.sqrt();
        assert!(head.hidden_weight.iter().all(|w| w.abs() <= bound));
        assert!(head.hidden_weight.iter().any(|w| w.abs() > bound / 2.0));
    }

    #[test]
    fn renumbering_moves_a_clusters_row_and_bias_together() {
        let mut head = Head::random(SHAPE, 1, &[0]);
        let before = head.clone();
        head.renumber(&[1, 2, 0]);
        assert_eq!(head.output_weight[4..8], before.output_weight[0..4]);
        assert_eq!(head.output_bias[1], before.output_bias[0]);
        assert_eq!(head.output_weight[0..4], before.output_weight[8..12]);
        assert_eq!(head.output_bias[0], before.output_bias[2]);
        assert_eq!(head.hidden_weight, before.hidden_weight);
    }
}
