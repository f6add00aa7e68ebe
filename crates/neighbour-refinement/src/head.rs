//! The clustering network that learns together with the backbone, and its moving average.
//!
//! Linear, ReLU, linear, without batch norm, which would see the reliable images in part only. It takes
//! embeddings at length `√D` and starts from the network that clustering kept, of the form `network` of
//! [`data::head`]. Its moving average gives the pseudo-labels, and is the network that the stage
//! writes.

use std::path::Path;

use anyhow::{Result, ensure};
use backbone::Segment;
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor};
use candle_nn::ops::softmax;
use data::head;
use layers::{BatchGroups, Builder, Network, Sgd};
use stage::container;
use training::ops::unit_rows;
use training::{Checkpoint, Seam, TrainedSegment};

/// Parameters by their names in `head.safetensors`: `(H, D)`, `(H,)`, `(K, H)`, `(K,)`.
const NAMES: [&str; 4] = ["hidden.weight", "hidden.bias", "output.weight", "output.bias"];

/// A clustering network that learns, and the moving average that follows it.
pub(crate) struct OnlineHead {
    online: TrainedSegment<Sgd>,
    target: Segment,
    /// `H`, `D` and `K`.
    extents: [usize; 3],
    groups: BatchGroups,
}

/// One pass of embeddings through the online network. Its logits are a variable of the loss.
pub(crate) struct HeadPass {
    /// At length `√D`, a function of the embeddings.
    input: Tensor,
    /// The output, `(N, K)`.
    pub(crate) logits: Seam,
}

impl OnlineHead {
    /// Starts from the head in `folder`; the moving average starts as a copy.
    ///
    /// - `width`: `D`, of the embeddings.
    ///
    /// # Errors
    ///
    /// The file is missing or damaged, holds no network, or one of other extents.
    pub(crate) fn open(
        folder: &Path,
        width: usize,
        clusters: usize,
        device: &Device,
    ) -> Result<Self> {
        let file = head::open(folder)?;
        let (path, form) = (file.path().display().to_string(), file.header_text("form")?);
        ensure!(
            form == "network",
            "`{path}` holds {form}, but refinement trains a network; cluster with `heads` above 0"
        );
        let hidden = file.shape("hidden.bias")?.iter().product();
        let extents = [hidden, width, clusters];
        let mut target = Segment::empty(plan(extents)?.on(device));
        for (name, want) in NAMES.into_iter().zip(shapes(extents)) {
            let found = file.shape(name)?;
            ensure!(
                found == want,
                "`{path}`: {name} is {found:?}, but the network to be refined needs {want:?}; \
                 cluster again with it"
            );
            target.parameters.set(name, &file.f32(name)?)?;
        }
        let online = TrainedSegment::new("online.head", target.clone());
        Ok(Self { online, target, extents, groups: BatchGroups::one() })
    }

    /// The same networks, which divide batches into these groups.
    ///
    /// # Errors
    ///
    /// The GPUs of the ranks cannot be connected.
    pub(crate) fn in_groups(self, groups: &BatchGroups) -> candle_core::Result<Self> {
        let online = self.online.in_groups(groups)?;
        Ok(Self { online, groups: groups.clone(), ..self })
    }

    /// The logits of the embeddings of a batch `(N, D)` by the online network.
    pub(crate) fn forward(&mut self, embedding: &Tensor) -> candle_core::Result<HeadPass> {
        let input = scaled(embedding)?;
        let logits = self.online.forward_batch(&input.detach())?;
        Ok(HeadPass { input, logits })
    }

    /// Announces the backward passes of this step: see [`TrainedSegment::expect_passes`].
    pub(crate) fn expect_passes(&mut self, passes: usize) -> candle_core::Result<()> {
        self.online.expect_passes(passes)
    }

    /// Adds the gradients of one pass to those of this step, and its gradient at the embedding to
    /// `gradients`.
    ///
    /// - `gradients`: of a loss that depends on the pass's logits.
    /// - `embedding`: the variable that the pass was computed from.
    pub(crate) fn backward(
        &mut self,
        HeadPass { input, logits }: HeadPass,
        gradients: &mut GradStore,
        embedding: &Tensor,
    ) -> candle_core::Result<()> {
        let Some(at_logits) = gradients.remove(&logits) else {
            candle_core::bail!("backward: the loss does not depend on the clustering network")
        };
        let own = self.groups.own_rows(&at_logits)?;
        let at_input = self.online.backward(logits, &own, true)?;
        let at_input = self.groups.all_rows(&at_input.expect("it was asked for"))?;
        // The pull-back through the scaling is the gradient of its product with a constant.
        let mut scaling = (input * at_input)?.sum_all()?.backward()?;
        let Some(gradient) = scaling.remove(embedding) else {
            candle_core::bail!("backward: the pass was computed from another embedding")
        };
        let sum = match gradients.remove(embedding) {
            Some(other) => (other + gradient)?,
            None => gradient,
        };
        gradients.insert(embedding, sum);
        Ok(())
    }

    /// One step along the gradients gathered since the last one.
    pub(crate) fn step(&mut self, rule: Sgd) -> candle_core::Result<()> {
        self.online.step(rule)
    }

    /// The first parameter whose gradient is not finite.
    pub(crate) fn first_gradient_not_finite(&mut self) -> candle_core::Result<Option<String>> {
        self.online.first_gradient_not_finite()
    }

    /// `ξ ← τ ξ + (1 − τ) θ` for every parameter of the moving average.
    pub(crate) fn follow(&mut self, decay: f64) -> candle_core::Result<()> {
        self.target.parameters.follow(&self.online.segment.parameters, decay)
    }

    /// The moving average's memberships `(N, K)` of embeddings `(N, D)`: constants.
    pub(crate) fn memberships(&mut self, embedding: &Tensor) -> candle_core::Result<Tensor> {
        softmax(&self.target.infer(&scaled(&embedding.detach())?)?, 1)
    }

    /// Saves or loads both networks and the momenta.
    pub(crate) fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        self.online.checkpoint(file)?;
        file.segment("target.head", &mut self.target)
    }

    /// Writes the moving average to `head.safetensors` in `folder`.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let values = NAMES.map(|name| self.target.parameters.get(name));
        let shapes = shapes(self.extents);
        let mut tensors = Vec::new();
        for ((name, values), shape) in NAMES.iter().zip(&values).zip(&shapes) {
            let values = values.as_ref().map_err(|error| anyhow::anyhow!("{name}: {error}"))?;
            tensors.push(container::Tensor::f32(*name, shape, values));
        }
        let [_, _, clusters] = self.extents;
        head::write(folder, clusters, "network", &tensors)
    }
}

/// The shapes of [`NAMES`].
fn shapes([hidden, width, clusters]: [usize; 3]) -> [Vec<usize>; 4] {
    [vec![hidden, width], vec![hidden], vec![clusters, hidden], vec![clusters]]
}

/// `W₂ relu(W₁ x + b₁) + b₂`.
fn plan([hidden, width, clusters]: [usize; 3]) -> candle_core::Result<Network> {
    let mut builder = Builder::features(width);
    builder.block("head");
    let value = builder.input();
    let value = builder.linear("hidden", value, hidden)?;
    let value = builder.relu(value)?;
    let value = builder.linear("output", value, clusters)?;
    builder.finish(value)
}

/// Rows at length `√D`.
fn scaled(embedding: &Tensor) -> candle_core::Result<Tensor> {
    let (_, width) = embedding.dims2()?;
    unit_rows(embedding)? * (width as f64).sqrt()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device::Cpu, Var};
    use training::ops::relu;

    use super::*;
    use crate::loss::balanced_cross_entropy;
    use crate::tests::write_head;

    const LABELS: [Option<u32>; 3] = [Some(2), None, Some(0)];

    fn rows() -> Result<Var> {
        let rows = [[0.3f32, -1.2, 0.7, 2.], [0.1, -0.4, 0., 0.9], [0.2, -0.7, 5., 1.]];
        Ok(Var::new(&rows, &Cpu)?)
    }

    /// The gradient of the cross-entropy at the embeddings, all by candle.
    fn by_autograd(folder: &Path) -> Result<Vec<f32>> {
        let file = head::open(folder)?;
        let tensor = |name: &str| -> Result<Tensor> {
            Ok(Tensor::from_vec(file.f32(name)?, file.shape(name)?, &Cpu)?)
        };
        let rows = rows()?;
        let inner = scaled(&rows)?.matmul(&tensor("hidden.weight")?.t()?)?;
        let inner = relu(&inner.broadcast_add(&tensor("hidden.bias")?)?)?;
        let logits = inner.matmul(&tensor("output.weight")?.t()?)?;
        let logits = logits.broadcast_add(&tensor("output.bias")?)?;
        let loss = balanced_cross_entropy(&logits, &LABELS, 0.1)?.expect("reliable ones");
        let gradients = loss.backward()?;
        Ok(gradients.get(&rows).expect("a gradient").to_vec2::<f32>()?.concat())
    }

    #[test]
    fn the_gradient_at_the_embedding_is_that_of_autograd_and_adds_to_other_gradients() -> Result<()>
    {
        let folder = tempfile::tempdir()?;
        write_head(folder.path(), 4, 3)?;
        let mut head = OnlineHead::open(folder.path(), 4, 3, &Cpu)?;
        let rows = rows()?;
        let pass = head.forward(&rows)?;
        let term = balanced_cross_entropy(&pass.logits, &LABELS, 0.1)?.expect("reliable ones");
        // The sum of the rows has a gradient of 1 everywhere.
        let mut gradients = (term + rows.sum_all()?)?.backward()?;
        head.backward(pass, &mut gradients, &rows)?;
        let got = gradients.get(&rows).expect("a gradient").to_vec2::<f32>()?.concat();
        let want = by_autograd(folder.path())?;
        assert!(want.iter().any(|g| g.abs() > 0.01), "{want:?}");
        for (got, want) in got.iter().zip(&want) {
            assert!((got - 1. - want).abs() < 1e-5, "got {got}, want 1 + {want}");
        }
        // An image that is not reliable has no gradient.
        assert!(want[4..8].iter().all(|&g| g == 0.));
        Ok(())
    }

    #[test]
    fn the_moving_average_follows_and_is_what_is_written() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        for folder in [&from, &to] {
            std::fs::create_dir(folder)?;
        }
        write_head(&from, 4, 3)?;
        let mut head = OnlineHead::open(&from, 4, 3, &Cpu)?;
        head.write(&to)?;
        let bytes = |folder: &Path| std::fs::read(folder.join(head::FILE)).expect("written");
        assert!(bytes(&from) == bytes(&to), "before the first step");
        let before = head.memberships(rows()?.as_tensor())?.to_vec2::<f32>()?;
        assert!(before.iter().all(|row| (row.iter().sum::<f32>() - 1.).abs() < 1e-6));

        let rows = rows()?;
        let pass = head.forward(&rows)?;
        let term = balanced_cross_entropy(&pass.logits, &LABELS, 0.1)?.expect("reliable ones");
        let mut gradients = term.backward()?;
        head.backward(pass, &mut gradients, &rows)?;
        head.step(Sgd { learning_rate: 0.5, momentum: 0.9, weight_decay: 0. })?;
        assert_eq!(head.memberships(&rows)?.to_vec2::<f32>()?, before, "it has not followed yet");
        let value = |head: &OnlineHead| -> Result<[f32; 2]> {
            let of = |segment: &Segment| segment.parameters.get("output.bias");
            Ok([of(&head.online.segment)?[2], of(&head.target)?[2]])
        };
        let [online, target] = value(&head)?;
        head.follow(0.75)?;
        let [_, moved] = value(&head)?;
        assert!(online > target && (moved - (0.75 * target + 0.25 * online)).abs() < 1e-6);
        head.write(&to)?;
        assert!((head::open(&to)?.f32("output.bias")?[2] - moved).abs() < 1e-7);
        Ok(())
    }

    #[test]
    fn a_head_of_another_form_or_width_is_refused() -> Result<()> {
        let folder = tempfile::tempdir()?;
        write_head(folder.path(), 4, 3)?;
        for (width, clusters, name) in [(5, 3, "hidden.weight"), (4, 2, "output.weight")] {
            let error = OnlineHead::open(folder.path(), width, clusters, &Cpu).err();
            let message = error.expect("other extents").to_string();
            assert!(message.contains(name) && message.contains("cluster again"), "{message}");
        }
        let by = head::CentreMetric::Cosine;
        head::write_centres(folder.path(), &[0.; 6], 3, by)?;
        let error = OnlineHead::open(folder.path(), 4, 3, &Cpu).err().expect("centres");
        assert!(error.to_string().contains("`heads` above 0"), "{error}");
        Ok(())
    }
}
