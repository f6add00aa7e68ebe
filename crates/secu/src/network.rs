//! The network and its heads, and how they learn.

use std::path::Path;

use anyhow::{Context, Result};
use backbone::network_file::NamedTensor;
use backbone::{Segment, backbone_file};
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use layers::{Gradients, Mode, Modes, Momenta, Sgd, Tape};
use stage::container::Container;
use training::Trained;
use training::ops::unit_rows;

use crate::heads::Head;
use crate::{Config, heads};

/// Backbone, projector and heads. There is no target network and no predictor.
pub struct Learner {
    backbone: Learning,
    projector: Learning,
    /// The heads.
    pub heads: Vec<Head>,
}

/// A segment with its gradients and momenta.
struct Learning {
    segment: Segment,
    gradients: Gradients,
    momenta: Momenta,
}

/// Names of the segments in files.
const BACKBONE: &str = "online.backbone";
const PROJECTOR: &str = "online.projector";

/// What one view left behind: its projection, open to candle, and the tapes.
pub struct View {
    /// Output of the projector, `(N, P)`, not normalised.
    pub projection: Var,
    tapes: [Tape; 2],
}

impl Learner {
    /// Random first weights.
    ///
    /// - `images`: number of images that are trained on.
    ///
    /// # Errors
    ///
    /// A width is zero.
    pub fn random(config: &Config, images: usize, seed: u64, device: &Device) -> Result<Self> {
        let [backbone, projector] = config.plans()?;
        let width = config.projector.width;
        let head = |(number, &clusters): (usize, &usize)| {
            Head::random(number, clusters, width, images, config.constraint, seed, device)
        };
        Ok(Self {
            backbone: Learning::new(Segment::random("backbone", backbone, seed)?),
            projector: Learning::new(Segment::random("projector", projector, seed)?),
            heads: config.heads.iter().enumerate().map(head).collect::<Result<_>>()?,
        })
    }

    /// Starts from the `backbone.safetensors` in `folder`.
    ///
    /// # Errors
    ///
    /// The file is missing, damaged, or of another backbone.
    pub fn take_backbone(&mut self, folder: &Path) -> Result<()> {
        backbone_file::read(&folder.join(backbone_file::NAME), &mut self.backbone.segment)
    }

    /// The same before its first step, computing on `device`, where the heads lie already.
    ///
    /// # Errors
    ///
    /// The device fails.
    pub fn on(self, device: &Device) -> Result<Self> {
        Ok(Self {
            backbone: Learning::new(self.backbone.segment.on(device)?),
            projector: Learning::new(self.projector.segment.on(device)?),
            heads: self.heads,
        })
    }

    /// The projection of a view on batch statistics, `(N, H, W, C)` to a seam.
    ///
    /// # Errors
    ///
    /// `view` does not have the backbone's shape.
    pub fn forward(&mut self, view: &Tensor) -> Result<View> {
        let [mut first, mut second] =
            [&self.backbone, &self.projector].map(|part| part.segment.network().tape());
        let embedding = self.backbone.learn(view, &mut first)?;
        let projection = self.projector.learn(&embedding, &mut second)?;
        Ok(View { projection: Var::from_tensor(&projection)?, tapes: [first, second] })
    }

    /// Adds the gradients of a view to those of this step.
    ///
    /// # Errors
    ///
    /// No gradient reaches its projection: a fault of this program.
    pub fn backward(&mut self, view: View, gradients: &GradStore) -> Result<()> {
        let View { projection, tapes: [mut first, mut second] } = view;
        let gradient = gradients.get(&projection).context("a loss that misses a view")?;
        let at_embedding = self.projector.backward(&mut second, gradient, true)?;
        let at_embedding = at_embedding.context("the projector's input has a gradient")?;
        self.backbone.backward(&mut first, &at_embedding, false)?;
        Ok(())
    }

    /// The first gradient that is not finite, by its name in files.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn first_not_finite(&self, gradients: &GradStore) -> Result<Option<String>> {
        for (prefix, part) in [(BACKBONE, &self.backbone), (PROJECTOR, &self.projector)] {
            if let Some(name) = part.gradients.first_non_finite()? {
                return Ok(Some(format!("{prefix}.{name}")));
            }
        }
        for head in &self.heads {
            if let Some(name) = head.not_finite(gradients)? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// One step of network and centres, each at its own rate. At a rate of 0 the network stands
    /// still, while its momentum goes on.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn step(
        &mut self,
        gradients: &GradStore,
        learning_rate: f64,
        centres: heads::Rule,
    ) -> Result<()> {
        let heads::Rule { momentum, weight_decay, .. } = centres;
        let rule = Sgd { learning_rate, momentum, weight_decay };
        self.backbone.step(rule)?;
        self.projector.step(rule)?;
        self.heads.iter_mut().try_for_each(|head| head.descend(gradients, centres))
    }

    /// Unit-length projections of pictures `(N, P)` on running statistics: each row by itself.
    ///
    /// # Errors
    ///
    /// `pictures` does not have the backbone's shape.
    pub fn project(&mut self, pictures: &Tensor) -> Result<Tensor> {
        let embedding = self.backbone.apply(pictures)?;
        Ok(unit_rows(&self.projector.apply(&embedding)?)?)
    }
}

impl Learning {
    fn new(segment: Segment) -> Self {
        let (gradients, momenta) = (segment.network().gradients(), segment.network().momenta());
        Self { segment, gradients, momenta }
    }

    fn learn(&mut self, input: &Tensor, tape: &mut Tape) -> candle_core::Result<Tensor> {
        let modes = Modes::all(self.segment.network(), Mode::Batch);
        self.segment.forward(input, &modes, Some(tape))
    }

    fn apply(&mut self, input: &Tensor) -> candle_core::Result<Tensor> {
        let modes = Modes::all(self.segment.network(), Mode::Running);
        self.segment.forward(input, &modes, None)
    }

    fn backward(
        &mut self,
        tape: &mut Tape,
        gradient: &Tensor,
        input_gradient: bool,
    ) -> candle_core::Result<Option<Tensor>> {
        self.segment.backward(tape, gradient, &mut self.gradients, input_gradient)
    }

    fn step(&mut self, rule: Sgd) -> candle_core::Result<()> {
        self.segment.parameters.sgd(&self.gradients, &mut self.momenta, rule)?;
        self.gradients.zero();
        Ok(())
    }
}

impl Trained for Learner {
    fn segments(&self) -> Vec<(&'static str, &Segment)> {
        vec![(BACKBONE, &self.backbone.segment), (PROJECTOR, &self.projector.segment)]
    }

    fn segments_mut(&mut self) -> Vec<(&'static str, &mut Segment)> {
        vec![(BACKBONE, &mut self.backbone.segment), (PROJECTOR, &mut self.projector.segment)]
    }

    fn exported(&self) -> &Segment {
        &self.backbone.segment
    }

    fn variables(&self) -> Result<Vec<NamedTensor>> {
        self.heads.iter().map(Head::variable).collect()
    }

    fn take_up_variables(&mut self, network: &Container) -> Result<()> {
        self.heads.iter_mut().try_for_each(|head| head.take_up_variable(network))
    }

    fn memory(&self) -> Result<Vec<NamedTensor>> {
        let mut tensors = Vec::new();
        for (prefix, part) in [(BACKBONE, &self.backbone), (PROJECTOR, &self.projector)] {
            for entry in part.momenta.entries() {
                let name = format!("momenta.{prefix}.{}", entry.name);
                let values = part.momenta.get(&entry.name)?;
                tensors.push(NamedTensor { name, shape: entry.shape.clone(), values });
            }
        }
        for head in &self.heads {
            tensors.push(head.memory()?);
        }
        Ok(tensors)
    }

    fn take_up_memory(&mut self, state: &Container) -> Result<()> {
        let parts = [(BACKBONE, &mut self.backbone), (PROJECTOR, &mut self.projector)];
        for (prefix, part) in parts {
            for entry in part.momenta.entries().to_vec() {
                let values = state.f32(&format!("momenta.{prefix}.{}", entry.name))?;
                part.momenta.set(&entry.name, &values).with_context(|| {
                    format!("`{}` holds the momenta of another network", state.path().display())
                })?;
            }
        }
        self.heads.iter_mut().try_for_each(|head| head.take_up_memory(state))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What reaches the backbone through both views is the slope of the loss along it.
    #[test]
    fn the_backbones_gradient_matches_central_differences() -> Result<()> {
        const WEIGHT: &str = "layer3.0.conv2.weight";
        let config = crate::tests::config();
        let noise = |number: u64, width: usize| -> Result<Tensor> {
            let noise = training::noise(1., (8, width), number, &[], &Device::Cpu)?;
            noise.context("a deviation above 0")
        };
        let pictures = [noise(1, 42)?.reshape((8, 6, 7, 1))?, noise(2, 42)?.reshape((8, 6, 7, 1))?];
        let weights = [noise(3, 4)?, noise(4, 4)?];
        let mut learner = Learner::random(&config, 8, 1, &Device::Cpu)?;
        let loss = |learner: &mut Learner| -> Result<(Tensor, [View; 2])> {
            let views = [learner.forward(&pictures[0])?, learner.forward(&pictures[1])?];
            let sum =
                |view: usize| (views[view].projection.as_tensor() * &weights[view])?.sum_all();
            Ok(((sum(0)? + sum(1)?)?, views))
        };
        let (value, views) = loss(&mut learner)?;
        let gradients = value.backward()?;
        for view in views {
            learner.backward(view, &gradients)?;
        }
        let gradient = learner.backbone.gradients.get(WEIGHT)?;
        let length = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
        let at = learner.backbone.segment.parameters.get(WEIGHT)?;
        let mut value_at = |h: f32| -> Result<f32> {
            let along = at.iter().zip(&gradient).map(|(x, g)| x + h * g / length);
            learner.backbone.segment.parameters.set(WEIGHT, &along.collect::<Vec<_>>())?;
            Ok(loss(&mut learner)?.0.to_scalar()?)
        };
        let slope = (value_at(1e-2)? - value_at(-1e-2)?) / 2e-2;
        assert!((slope - length).abs() < 0.02 * length, "{slope}, want {length}");
        Ok(())
    }
}
