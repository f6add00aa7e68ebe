//! The networks of a training stage, and the seams between them and candle.
//!
//! Backbone, projector and predictor run outside candle's autograd, forward and backward. A *seam*
//! is an output opened to candle as a variable: the loss is candle's, and a seam's gradient is what
//! candle finds plus what the next segment hands back.

use std::path::Path;

use anyhow::Context as _;
use backbone::network_file::NamedTensor;
use backbone::{Configuration, Encoder, Segment, network_file};
use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};
use layers::{Gradients, Mode, Modes, Network, Tape};
use stage::container::Container;

use crate::Precision;
use crate::ops::unit_rows;
use crate::sgd::{Groups, Sgd};
use crate::trained::Trained;

/// All that learning changes: the online network, the target that follows it, the optimizer.
pub struct Learner {
    /// The network that gradients reach.
    pub online: Online,
    /// Its moving average.
    pub target: Target,
    /// The optimizer of the online network, with its momenta.
    pub optimizer: Sgd,
}

impl Learner {
    /// Random first weights; the target starts as a copy.
    ///
    /// # Errors
    ///
    /// A width of the configuration is zero.
    pub fn random(
        configuration: &Configuration,
        groups: Groups,
        precision: Precision,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let online = Online::random(configuration, precision, seed)?;
        let target = Target::copy_of(&online);
        let optimizer = Sgd::new(&online, groups);
        Ok(Self { online, target, optimizer })
    }

    /// Goes on from the `network.safetensors` in `folder`, which an earlier stage wrote; momenta
    /// start at zero.
    ///
    /// # Errors
    ///
    /// The file is missing, damaged, or of another network than `configuration`.
    pub fn open(
        folder: &Path,
        configuration: &Configuration,
        groups: Groups,
        precision: Precision,
    ) -> anyhow::Result<Self> {
        let [backbone, projector, predictor] = plans(configuration, precision)?;
        let online = Online::of(
            Segment::empty(backbone),
            Segment::empty(projector),
            Segment::empty(predictor),
        );
        let target = Target::copy_of(&online);
        let optimizer = Sgd::new(&online, groups);
        let mut learner = Self { online, target, optimizer };
        let file = network_file::open(folder)?;
        for (prefix, segment) in learner.segments_mut() {
            network_file::fill(&file, prefix, segment)?;
        }
        Ok(learner)
    }

    /// The same networks and momenta, computing on `device`. Between steps: gradients that were
    /// gathered are forgotten.
    ///
    /// # Errors
    ///
    /// A device fails.
    pub fn on(&self, device: &Device) -> Result<Self> {
        self.moved(|segment| segment.on(device))
    }

    fn moved(&self, to: impl Fn(&Segment) -> Result<Segment>) -> Result<Self> {
        let [backbone, projector, predictor] = self.online.segments();
        let online = Online::of(to(backbone)?, to(projector)?, to(predictor)?);
        let Target { backbone, projector } = &self.target;
        let target = Target { backbone: to(backbone)?, projector: to(projector)? };
        let optimizer = self.optimizer.on(&online)?;
        Ok(Self { online, target, optimizer })
    }
}

impl Trained for Learner {
    fn segments(&self) -> Vec<(&'static str, &Segment)> {
        let [backbone, projector, predictor] = SEGMENTS;
        vec![
            (backbone, &self.online.backbone),
            (projector, &self.online.projector),
            (predictor, &self.online.predictor),
            (TARGET_BACKBONE, &self.target.backbone),
            (TARGET_PROJECTOR, &self.target.projector),
        ]
    }

    fn segments_mut(&mut self) -> Vec<(&'static str, &mut Segment)> {
        let [backbone, projector, predictor] = SEGMENTS;
        vec![
            (backbone, &mut self.online.backbone),
            (projector, &mut self.online.projector),
            (predictor, &mut self.online.predictor),
            (TARGET_BACKBONE, &mut self.target.backbone),
            (TARGET_PROJECTOR, &mut self.target.projector),
        ]
    }

    fn exported(&self) -> &Segment {
        &self.target.backbone
    }

    fn memory(&self) -> anyhow::Result<Vec<NamedTensor>> {
        let mut tensors = Vec::new();
        for (segment, momenta) in SEGMENTS.iter().zip(&self.optimizer.momenta) {
            for entry in momenta.entries() {
                let name = format!("momenta.{segment}.{}", entry.name);
                let values = momenta.get(&entry.name)?;
                tensors.push(NamedTensor { name, shape: entry.shape.clone(), values });
            }
        }
        Ok(tensors)
    }

    fn take_up_memory(&mut self, state: &Container) -> anyhow::Result<()> {
        for (segment, momenta) in SEGMENTS.iter().zip(&mut self.optimizer.momenta) {
            for entry in momenta.entries().to_vec() {
                let values = state.f32(&format!("momenta.{segment}.{}", entry.name))?;
                momenta.set(&entry.name, &values).with_context(|| {
                    format!("`{}` holds the momenta of another network", state.path().display())
                })?;
            }
        }
        Ok(())
    }
}

/// Names of the online segments in files, in the order of [`Online::segments`].
pub(crate) const SEGMENTS: [&str; 3] = ["online.backbone", "online.projector", "online.predictor"];
const TARGET_BACKBONE: &str = "target.backbone";
const TARGET_PROJECTOR: &str = "target.projector";

/// Backbone, projector and predictor, with their gradients.
pub struct Online {
    /// Picture to embedding.
    pub backbone: Segment,
    /// Embedding to projection.
    pub projector: Segment,
    /// Projection to prediction.
    pub predictor: Segment,
    pub(crate) gradients: [Gradients; 3],
}

impl Online {
    /// Random first weights.
    ///
    /// # Errors
    ///
    /// A width of the configuration is zero.
    pub fn random(configuration: &Configuration, precision: Precision, seed: u64) -> Result<Self> {
        let [backbone, projector, predictor] = plans(configuration, precision)?;
        Ok(Self::of(
            Segment::random("backbone", backbone, seed)?,
            Segment::random("projector", projector, seed)?,
            Segment::random("predictor", predictor, seed)?,
        ))
    }

    fn of(backbone: Segment, projector: Segment, predictor: Segment) -> Self {
        let gradients = [&backbone, &projector, &predictor].map(|s| s.network().gradients());
        Self { backbone, projector, predictor, gradients }
    }

    /// One view through all three segments, on batch statistics; what the backward pass needs is
    /// kept in the [`Pass`].
    ///
    /// - `view`: `(N, H, W, C)`, normalised.
    /// - `noise`: `(N, P)`, added to the projection on its way into the predictor alone.
    ///
    /// # Errors
    ///
    /// `view` or `noise` has another shape.
    pub fn forward(&mut self, view: &Tensor, noise: Option<&Tensor>) -> Result<Pass> {
        self.forward_perturbed(view, |_| Ok(noise.cloned()))
    }

    /// The same with noise that may depend on the projection, which it is given; no gradient
    /// passes through what it makes of it.
    ///
    /// # Errors
    ///
    /// `view` or what `noise` returns has another shape, or `noise` fails.
    pub fn forward_perturbed(
        &mut self,
        view: &Tensor,
        noise: impl FnOnce(&Tensor) -> Result<Option<Tensor>>,
    ) -> Result<Pass> {
        let mut tapes = self.segments().map(|segment| segment.network().tape());
        let [backbone_tape, projector_tape, predictor_tape] = &mut tapes;
        let embedding = learn(&mut self.backbone, view, backbone_tape)?;
        let projection = learn(&mut self.projector, &embedding, projector_tape)?;
        let prediction = match noise(&projection)? {
            None => learn(&mut self.predictor, &projection, predictor_tape)?,
            Some(noise) => {
                let perturbed = (projection.as_tensor() + noise)?;
                learn(&mut self.predictor, &perturbed, predictor_tape)?
            }
        };
        Ok(Pass { embedding, projection, prediction, tapes })
    }

    /// Adds the gradients of one pass to those of this step.
    ///
    /// - `gradients`: what candle found at the seams. A seam that the loss does not use counts as
    ///   zero.
    ///
    /// # Errors
    ///
    /// A gradient has another shape than its seam.
    pub fn backward(&mut self, pass: Pass, gradients: &GradStore) -> Result<()> {
        let Pass { embedding, projection, prediction, mut tapes } = pass;
        let [backbone_tape, projector_tape, predictor_tape] = &mut tapes;
        let [to_backbone, to_projector, to_predictor] = &mut self.gradients;
        let mut gradient = gradients.get(&prediction).cloned();
        if let Some(at_prediction) = &gradient {
            let (s, into) = (&self.predictor, to_predictor);
            gradient = s.backward(predictor_tape, at_prediction, into, true)?;
        }
        gradient = sum(gradient, gradients.get(&projection))?;
        if let Some(at_projection) = &gradient {
            let (s, into) = (&self.projector, to_projector);
            gradient = s.backward(projector_tape, at_projection, into, true)?;
        }
        gradient = sum(gradient, gradients.get(&embedding))?;
        if let Some(at_embedding) = &gradient {
            self.backbone.backward(backbone_tape, at_embedding, to_backbone, false)?;
        }
        Ok(())
    }

    /// Backbone, projector, predictor.
    pub fn segments(&self) -> [&Segment; 3] {
        [&self.backbone, &self.projector, &self.predictor]
    }

    /// The first parameter whose gradient is not finite, as `online.<segment>.<parameter>`.
    ///
    /// # Errors
    ///
    /// The device that they lie on fails.
    pub fn first_gradient_not_finite(&self) -> Result<Option<String>> {
        for (segment, gradients) in SEGMENTS.iter().zip(&self.gradients) {
            if let Some(name) = gradients.first_non_finite()? {
                return Ok(Some(format!("{segment}.{name}")));
            }
        }
        Ok(None)
    }
}

/// The plans of the online segments, computing in `precision`.
fn plans(configuration: &Configuration, precision: Precision) -> Result<[Network; 3]> {
    let in_precision = |plan: Network| plan.with_precision(precision.into());
    Ok([
        in_precision(configuration.backbone_plan()?),
        in_precision(configuration.projector_plan()?),
        in_precision(configuration.predictor_plan()?),
    ])
}

/// Forward on batch statistics with a tape; the output is a seam.
fn learn(segment: &mut Segment, input: &Tensor, tape: &mut Tape) -> Result<Var> {
    let modes = Modes::all(segment.network(), Mode::Batch);
    Var::from_tensor(&segment.forward(input, &modes, Some(tape))?)
}

fn sum(a: Option<Tensor>, b: Option<&Tensor>) -> Result<Option<Tensor>> {
    match (a, b) {
        (Some(a), Some(b)) => (a + b).map(Some),
        (a, b) => Ok(a.or_else(|| b.cloned())),
    }
}

/// What one view left behind: the seams, and the tapes of the segments.
pub struct Pass {
    embedding: Var,
    projection: Var,
    prediction: Var,
    tapes: [Tape; 3],
}

impl Pass {
    /// Output of the backbone, `(N, D)`.
    pub fn embedding(&self) -> &Var {
        &self.embedding
    }

    /// Output of the projector, `(N, P)`: neither normalised nor with noise.
    pub fn projection(&self) -> &Var {
        &self.projection
    }

    /// Output of the predictor, `(N, P)`.
    pub fn prediction(&self) -> &Var {
        &self.prediction
    }
}

/// Which of the networks in a file [`Target::open`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The moving average.
    Target,
    /// The network that gradients reached.
    Online,
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Target => "target",
            Self::Online => "online",
        })
    }
}

/// Backbone and projector whose parameters are a moving average of the online network's. Their
/// batch-norm statistics are their own.
pub struct Target {
    /// Picture to embedding.
    pub backbone: Segment,
    /// Embedding to projection.
    pub projector: Segment,
}

impl Target {
    /// A target that starts as a copy, statistics included.
    pub fn copy_of(online: &Online) -> Self {
        Self { backbone: online.backbone.clone(), projector: online.projector.clone() }
    }

    /// The same target, computing on `device`.
    ///
    /// # Errors
    ///
    /// A device fails.
    pub fn on(&self, device: &Device) -> Result<Self> {
        Ok(Self { backbone: self.backbone.on(device)?, projector: self.projector.on(device)? })
    }

    /// Reads the target out of `network.safetensors` in `folder`; where the method that trained
    /// the network has none, the online network in its place.
    ///
    /// # Errors
    ///
    /// The file is missing, damaged, or of another network than `encoder`.
    pub fn open(
        folder: &Path,
        encoder: &Encoder,
        precision: Precision,
    ) -> anyhow::Result<(Self, Source)> {
        let file = network_file::open(folder)?;
        let (source, [to_backbone, to_projector]) =
            match file.names().any(|name| name.starts_with("target.")) {
                true => (Source::Target, [TARGET_BACKBONE, TARGET_PROJECTOR]),
                false => (Source::Online, [SEGMENTS[0], SEGMENTS[1]]),
            };
        let norm = format!("{to_projector}.norm.weight");
        let with_norm = source == Source::Target || file.names().any(|name| name == norm);
        let empty = |plan: Network| Segment::empty(plan.with_precision(precision.into()));
        let mut backbone = empty(encoder.backbone_plan()?);
        let mut projector = empty(encoder.projector_plan(with_norm)?);
        let reading = || format!("reading the {source} network");
        network_file::fill(&file, to_backbone, &mut backbone).with_context(reading)?;
        network_file::fill(&file, to_projector, &mut projector).with_context(reading)?;
        Ok((Self { backbone, projector }, source))
    }

    /// The projection `(N, P)` of a view, on batch statistics, not normalised. Nothing is kept for
    /// a backward pass: it is a constant of the loss.
    ///
    /// # Errors
    ///
    /// `view` does not have the backbone's shape.
    pub fn project(&mut self, view: &Tensor) -> Result<Tensor> {
        let modes = Modes::all(self.backbone.network(), Mode::Batch);
        let embedding = self.backbone.forward(view, &modes, None)?;
        let modes = Modes::all(self.projector.network(), Mode::Batch);
        self.projector.forward(&embedding, &modes, None)
    }

    /// Gives back what [`project`](Self::project) keeps of the weights for its next call, once the
    /// last one before they change has been: the online network's passes need the memory.
    pub fn rest(&self) {
        self.backbone.parameters.free_packed_weights();
        self.projector.parameters.free_packed_weights();
    }

    /// The embedding `(N, D)` and the unit-length projection `(N, P)` of pictures, on running
    /// statistics: each row depends on its own picture alone.
    ///
    /// # Errors
    ///
    /// `pictures` does not have the backbone's shape.
    pub fn embed(&mut self, pictures: &Tensor) -> Result<(Tensor, Tensor)> {
        let embedding = self.embedding(pictures)?;
        let projection = self.projector.infer(&embedding)?;
        Ok((embedding, unit_rows(&projection)?))
    }

    /// The embedding `(N, D)` of pictures alone, on running statistics.
    ///
    /// # Errors
    ///
    /// `pictures` does not have the backbone's shape.
    pub fn embedding(&mut self, pictures: &Tensor) -> Result<Tensor> {
        self.backbone.infer(pictures)
    }

    /// `ξ ← τ ξ + (1 − τ) θ` for every parameter; statistics are left as they are.
    ///
    /// - `decay`: τ, from a [`TargetDecay`](crate::TargetDecay).
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn follow(&mut self, online: &Online, decay: f64) -> Result<()> {
        self.backbone.parameters.follow(&online.backbone.parameters, decay)?;
        self.projector.parameters.follow(&online.projector.parameters, decay)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use backbone::{Architecture, Depth, Predictor, Projector, Stem};
    use candle_core::Device::Cpu;

    use super::*;
    use crate::loss::regression_loss;

    /// A network small enough to be trained in a test.
    pub(crate) fn tiny() -> Configuration {
        Configuration {
            backbone: Architecture { depth: Depth::Ten, width: 2, stem: Stem::Plain },
            projector: Projector { hidden: 8, width: 4 },
            predictor: Predictor { hidden: 8 },
            channels: 2,
            input: serde_json::json!({ "height": 5, "width": 7 }),
        }
    }

    /// Six pictures of 5 × 7 pixels and 2 channels, neither square nor symmetric, by number.
    pub(crate) fn pictures(number: u64) -> Result<Tensor> {
        let shape = (6, 5 * 7 * 2);
        let noise = crate::noise(1., shape, number, &[], &Cpu)?.expect("a deviation above 0");
        noise.reshape((6, 5, 7, 2))
    }

    pub(crate) fn learner(seed: u64) -> anyhow::Result<Learner> {
        learner_in(Precision::F32, seed)
    }

    fn learner_in(precision: Precision, seed: u64) -> anyhow::Result<Learner> {
        Learner::random(&tiny(), Groups::byol(0.9, 5e-4, 10.)?, precision, seed)
    }

    fn all_gradients(online: &Online) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for (segment, gradients) in online.segments().iter().zip(&online.gradients) {
            for entry in segment.parameters.entries() {
                all.extend(gradients.get(&entry.name)?);
            }
        }
        Ok(all)
    }

    /// A loss that uses all three seams, with weights that differ from row to row.
    fn loss_at_all_seams(pass: &Pass) -> Result<Tensor> {
        let weighted = |seam: &Tensor, salt: f32| -> Result<Tensor> {
            let count = seam.elem_count();
            let weights: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7 + salt).sin()).collect();
            (seam * Tensor::from_vec(weights, seam.shape(), &Cpu)?)?.sum_all()
        };
        let sum = (weighted(pass.embedding(), 1.)? + weighted(pass.projection(), 2.)?)?;
        sum + weighted(pass.prediction(), 3.)?
    }

    #[test]
    fn gradients_through_all_seams_match_central_differences() -> anyhow::Result<()> {
        let mut online = learner(3)?.online;
        // The published first weights of the predictor are too small for differences in f32.
        let weights: Vec<f32> = (0..32).map(|i| (i as f32).sin()).collect();
        online.predictor.parameters.set("output.weight", &weights)?;
        let view = pictures(1)?;
        let noise = crate::noise(0.1, (6, 4), 2, &[], &Cpu)?;
        let pass = online.forward(&view, noise.as_ref())?;
        let gradients = loss_at_all_seams(&pass)?.backward()?;
        online.backward(pass, &gradients)?;
        for (segment, name) in [
            (0, "conv1.weight"),
            (0, "layer4.0.bn2.bias"),
            (1, "hidden.weight"),
            (1, "output.bias"),
            (2, "hidden.weight"),
            (2, "output.weight"),
        ] {
            let analytic = online.gradients[segment].get(name)?;
            let values = online.segments()[segment].parameters.get(name)?;
            let largest = f64::from(analytic.iter().fold(0f32, |a, g| a.max(g.abs())));
            for place in [0, values.len() / 2, values.len() - 1] {
                let mut at = |change: f32| -> Result<f64> {
                    let mut changed = values.clone();
                    changed[place] += change;
                    let [a, b, c] =
                        [&mut online.backbone, &mut online.projector, &mut online.predictor];
                    [a, b, c][segment].parameters.set(name, &changed)?;
                    let pass = online.forward(&view, noise.as_ref())?;
                    loss_at_all_seams(&pass)?.to_scalar::<f32>().map(f64::from)
                };
                let h = 3e-4f32;
                let want = (at(h)? - at(-h)?) / (2. * f64::from(h));
                at(0.)?;
                let got = f64::from(analytic[place]);
                assert!(
                    (got - want).abs() < 0.03 * want.abs() + 2e-3 * largest + 0.01,
                    "{name}[{place}]: got {got}, want {want}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn gradients_of_two_passes_add_up_whatever_the_order_of_the_backward_passes()
    -> anyhow::Result<()> {
        let (mut online, mut target) = {
            let l = learner(3)?;
            (l.online, l.target)
        };
        let (view_1, view_2) = (pictures(1)?, pictures(2)?);
        let projection = target.project(&view_2)?;
        let mut one_by_one = Vec::new();
        for view in [&view_1, &view_2] {
            let mut fresh = learner(3)?.online;
            let pass = fresh.forward(view, None)?;
            let gradients = regression_loss(pass.prediction(), &projection)?.backward()?;
            fresh.backward(pass, &gradients)?;
            one_by_one.push(all_gradients(&fresh)?);
        }
        let (pass_1, pass_2) = (online.forward(&view_1, None)?, online.forward(&view_2, None)?);
        for pass in [pass_1, pass_2] {
            let gradients = regression_loss(pass.prediction(), &projection)?.backward()?;
            online.backward(pass, &gradients)?;
        }
        for ((sum, a), b) in all_gradients(&online)?.iter().zip(&one_by_one[0]).zip(&one_by_one[1])
        {
            assert_eq!(*sum, a + b);
        }
        Ok(())
    }

    #[test]
    fn precision_changes_the_numbers_a_little_and_first_weights_not_at_all() -> anyhow::Result<()> {
        let steps = |precision| -> anyhow::Result<(Vec<f32>, Vec<f32>)> {
            let mut learner = learner_in(precision, 3)?;
            let first = learner.online.backbone.parameters.to_vec()?;
            let Learner { online, target, optimizer } = &mut learner;
            let projection = target.project(&pictures(2)?)?;
            let pass = online.forward(&pictures(1)?, None)?;
            let gradients = regression_loss(pass.prediction(), &projection)?.backward()?;
            online.backward(pass, &gradients)?;
            optimizer.step(online, 0.05)?;
            target.follow(online, 0.9)?;
            let projection = target.project(&pictures(2)?)?.flatten_all()?.to_vec1()?;
            Ok((first, projection))
        };
        let (first, exact) = steps(Precision::F32)?;
        let (first_again, rounded) = steps(Precision::Bf16)?;
        assert_eq!(first, first_again);
        assert_ne!(exact, rounded);
        let length = exact.iter().map(|x| x * x).sum::<f32>().sqrt();
        let off = exact.iter().zip(&rounded).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
        assert!(off < 0.05 * length, "off by {off} of {length}");
        Ok(())
    }

    #[test]
    fn noise_enters_the_predictor_alone() -> anyhow::Result<()> {
        let view = pictures(1)?;
        let noise = crate::noise(0.5, (6, 4), 2, &[], &Cpu)?;
        let plain = learner(3)?.online.forward(&view, None)?;
        let noisy = learner(3)?.online.forward(&view, noise.as_ref())?;
        let values = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        assert_eq!(values(plain.projection())?, values(noisy.projection())?);
        assert_ne!(values(plain.prediction())?, values(noisy.prediction())?);
        Ok(())
    }

    /// BYOL steps with weights, momenta and statistics at the end, under their names in files.
    fn steps(learner: &mut Learner) -> anyhow::Result<Vec<NamedTensor>> {
        for step in 0..3 {
            let Learner { online, target, optimizer } = &mut *learner;
            let projection = target.project(&pictures(step)?)?;
            let pass = online.forward(&pictures(10 + step)?, None)?;
            let loss = regression_loss(pass.prediction(), &projection)?;
            online.backward(pass, &loss.backward()?)?;
            assert_eq!(online.first_gradient_not_finite()?, None);
            optimizer.step(online, 0.05)?;
            target.follow(online, 0.9)?;
        }
        let mut tensors = learner.memory()?;
        for (prefix, segment) in learner.segments() {
            tensors.extend(network_file::tensors(prefix, segment)?);
        }
        Ok(tensors)
    }

    #[test]
    fn steps_by_tensor_operations_leave_the_state_that_steps_by_kernels_leave() -> anyhow::Result<()>
    {
        let mut kernels = learner(5)?;
        // Between the first steps, so that momenta move too.
        steps(&mut kernels)?;
        let by_tensors = |s: &Segment| s.with_network(s.network().by_tensor_operations(&Cpu));
        let mut other = kernels.moved(by_tensors)?;
        let mut back = other.on(&Cpu)?;
        let (want, got) = (steps(&mut kernels)?, steps(&mut other)?);
        assert_eq!(want.len(), got.len());
        for (want, got) in want.iter().zip(&got) {
            assert_eq!((&want.name, &want.shape), (&got.name, &got.shape));
            let size = want.values.iter().fold(0.1f32, |a, b| a.max(b.abs()));
            for (a, b) in want.values.iter().zip(&got.values) {
                assert!((a - b).abs() < 1e-3 * size, "{}: {a} and {b}", want.name);
            }
        }
        // There and back again changed no bit.
        for (want, got) in want.iter().zip(steps(&mut back)?) {
            assert_eq!(want.values, got.values, "{}", want.name);
        }
        Ok(())
    }

    /// ProPos, case 8: three updates, and the statistics of the target's own.
    #[test]
    fn target_follows_parameters_and_keeps_statistics_of_its_own() -> anyhow::Result<()> {
        let Learner { mut online, mut target, .. } = learner(3)?;
        target.backbone.parameters.set("bn1.bias", &[0., 0.])?;
        online.backbone.parameters.set("bn1.bias", &[1., 2.])?;
        for _ in 0..3 {
            target.follow(&online, 0.996)?;
        }
        let followed = target.backbone.parameters.get("bn1.bias")?;
        assert!((followed[0] - 0.01195206).abs() < 1e-7, "{followed:?}");
        assert!((followed[1] - 0.02390413).abs() < 1e-7, "{followed:?}");

        let mean = |target: &Target| target.backbone.statistics.get("bn1.running_mean");
        let before = mean(&target)?;
        online.forward(&pictures(1)?, None)?;
        target.follow(&online, 0.5)?;
        assert_eq!(mean(&target)?, before, "statistics do not follow");
        target.embed(&pictures(1)?)?;
        assert_eq!(mean(&target)?, before, "running statistics are read, not changed");
        target.project(&pictures(1)?)?;
        assert_ne!(mean(&target)?, before, "batch statistics are gathered");
        Ok(())
    }

    #[test]
    fn embedding_of_a_picture_does_not_depend_on_its_neighbours() -> anyhow::Result<()> {
        let mut target = learner(3)?.target;
        let all = pictures(1)?;
        let (together, unit) = target.embed(&all)?;
        let (alone, _) = target.embed(&all.narrow(0, 2, 1)?)?;
        assert_eq!(together.to_vec2::<f32>()?[2], alone.to_vec2::<f32>()?[0]);
        for row in unit.to_vec2::<f32>()? {
            let length = row.iter().map(|x| x * x).sum::<f32>();
            assert!((length - 1.).abs() < 1e-5, "{length}");
        }
        Ok(())
    }
}
