//! The networks of BYOL and of the methods built on it: an online network, which learns, and a
//! target, its moving average.

use std::path::Path;

use anyhow::Context as _;
use backbone::{Configuration, Encoder, Segment, backbone_file, network_file};
use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor};
use layers::{BatchGroups, Mode, Modes, Network, Sgd};

use crate::checkpoint::{self, Checkpoint, Trained, load_network};
use crate::ops::unit_rows;
use crate::segment::{Seam, TrainedSegment, backward};
use crate::{Precision, SgdTable};

/// An online network and the target that follows it.
pub struct Learner {
    /// The network that gradients reach.
    pub online: Online,
    /// Its moving average.
    pub target: Target,
}

/// Names in files.
const ONLINE: [&str; 3] = ["online.backbone", "online.projector", "online.predictor"];
const TARGET: [&str; 2] = ["target.backbone", "target.projector"];

impl Learner {
    /// Random first weights; the target starts as a copy.
    ///
    /// - `optimizer`: how the online network learns.
    ///
    /// # Errors
    ///
    /// A width of the configuration is zero.
    pub fn random(
        configuration: &Configuration,
        optimizer: SgdTable,
        precision: Precision,
        seed: u64,
    ) -> anyhow::Result<Self> {
        let [backbone, projector, predictor] = plans(configuration, precision)?;
        Ok(Self::of(
            [
                Segment::random("backbone", backbone, seed)?,
                Segment::random("projector", projector, seed)?,
                Segment::random("predictor", predictor, seed)?,
            ],
            optimizer,
        ))
    }

    /// Continues from the `network.safetensors` in `folder`, which an earlier stage wrote; momenta
    /// start at zero.
    ///
    /// # Errors
    ///
    /// The file is missing, damaged, or of another network than `configuration`.
    pub fn open(
        folder: &Path,
        configuration: &Configuration,
        optimizer: SgdTable,
        precision: Precision,
    ) -> anyhow::Result<Self> {
        let mut learner = Self::of(plans(configuration, precision)?.map(Segment::empty), optimizer);
        load_network(folder, &mut learner)?;
        Ok(learner)
    }

    /// Loads the backbone in `folder` into the online network; the target starts as a copy of it.
    ///
    /// # Errors
    ///
    /// The file is missing, damaged, or of another backbone.
    pub fn load_backbone(&mut self, folder: &Path) -> anyhow::Result<()> {
        let backbone = &mut self.online.backbone.segment;
        backbone_file::read(&folder.join(backbone_file::NAME), backbone)?;
        self.target = Target::copy_of(&self.online);
        Ok(())
    }

    /// Loads the momenta from the state that a finished run left in `folder`, so that one optimizer
    /// spans several rounds.
    ///
    /// # Errors
    ///
    /// The file is missing, damaged, or of another network.
    pub fn load_momenta(&mut self, folder: &Path) -> anyhow::Result<()> {
        Checkpoint::load(None, Some(&checkpoint::open(folder)?), self)
    }

    /// The same networks and momenta on `device`, without gathered gradients.
    pub fn on(&self, device: &Device) -> Result<Self> {
        self.moved(|segment| segment.on(device))
    }

    /// The same networks, which divide batches into these groups.
    ///
    /// # Errors
    ///
    /// The GPUs of the ranks cannot be connected.
    pub fn in_groups(self, groups: &BatchGroups) -> Result<Self> {
        if groups.is_one() {
            return Ok(self);
        }
        let Online { backbone, projector, predictor, optimizer } = self.online;
        let online = Online {
            backbone: backbone.in_groups(groups)?,
            projector: projector.in_groups(groups)?,
            predictor: predictor.in_groups(groups)?,
            optimizer,
        };
        let Target { backbone, projector, .. } = self.target;
        let target = Target {
            backbone: backbone.in_groups(groups)?,
            projector: projector.in_groups(groups)?,
            groups: groups.clone(),
        };
        Ok(Self { online, target })
    }

    fn of([backbone, projector, predictor]: [Segment; 3], optimizer: SgdTable) -> Self {
        let online = Online {
            backbone: TrainedSegment::new(ONLINE[0], backbone),
            projector: TrainedSegment::new(ONLINE[1], projector),
            predictor: TrainedSegment::new(ONLINE[2], predictor),
            optimizer,
        };
        Self { target: Target::copy_of(&online), online }
    }

    fn moved(&self, to: impl Fn(&Segment) -> Result<Segment>) -> Result<Self> {
        let Online { backbone, projector, predictor, optimizer } = &self.online;
        let online = Online {
            backbone: backbone.moved(&to)?,
            projector: projector.moved(&to)?,
            predictor: predictor.moved(&to)?,
            optimizer: *optimizer,
        };
        let Target { backbone, projector, groups } = &self.target;
        let (backbone, projector, groups) = (to(backbone)?, to(projector)?, groups.clone());
        Ok(Self { online, target: Target { backbone, projector, groups } })
    }
}

impl Trained for Learner {
    fn checkpoint(&mut self, file: &mut Checkpoint) -> anyhow::Result<()> {
        self.online.backbone.checkpoint(file)?;
        self.online.projector.checkpoint(file)?;
        self.online.predictor.checkpoint(file)?;
        file.segment(TARGET[0], &mut self.target.backbone)?;
        file.segment(TARGET[1], &mut self.target.projector)
    }

    fn exported(&self) -> Option<&Segment> {
        Some(&self.target.backbone)
    }
}

/// Backbone, projector and predictor, which learn by SGD with momentum.
pub struct Online {
    /// Picture to embedding.
    pub backbone: TrainedSegment<Sgd>,
    /// Embedding to projection.
    pub projector: TrainedSegment<Sgd>,
    /// Projection to prediction.
    pub predictor: TrainedSegment<Sgd>,
    optimizer: SgdTable,
}

impl Online {
    /// One view through all three segments, on batch statistics. Returns the seams at the embedding
    /// `(N, D)`, the projection `(N, P)`, without noise, and the prediction `(N, P)`.
    ///
    /// - `view`: `(N, H, W, C)`, normalised, of the pictures of this rank.
    /// - `noise`: `(N, P)`, added to the projection before the predictor.
    ///
    /// # Errors
    ///
    /// `view` or `noise` has another shape.
    pub fn forward(&mut self, view: &Tensor, noise: Option<&Tensor>) -> Result<[Seam; 3]> {
        self.forward_perturbed(view, |_| Ok(noise.cloned()))
    }

    /// Like [`forward`](Self::forward), with noise computed from the projection. No gradient flows
    /// through that computation.
    ///
    /// # Errors
    ///
    /// `view` or the noise has another shape, or `noise` fails.
    pub fn forward_perturbed(
        &mut self,
        view: &Tensor,
        noise: impl FnOnce(&Tensor) -> Result<Option<Tensor>>,
    ) -> Result<[Seam; 3]> {
        let embedding = self.backbone.forward(view)?;
        let projection = self.projector.forward_batch(&embedding)?;
        let prediction = match noise(&projection)? {
            None => self.predictor.forward_batch(&projection)?,
            Some(noise) => self.predictor.forward_batch(&(&*projection + noise)?)?,
        };
        Ok([embedding, projection, prediction])
    }

    /// Announces the backward passes of this step, for all three segments: see [`TrainedSegment::expect_passes`].
    ///
    /// # Errors
    ///
    /// All passes of an earlier announcement have come, and no step was taken since.
    pub fn expect_passes(&mut self, passes: usize) -> Result<()> {
        for segment in [&mut self.backbone, &mut self.projector, &mut self.predictor] {
            segment.expect_passes(passes)?;
        }
        Ok(())
    }

    /// Adds the gradients of one pass to those of this step: see [`backward`].
    ///
    /// # Errors
    ///
    /// A gradient has another shape than its seam.
    pub fn backward(&mut self, seams: [Seam; 3], gradients: &GradStore) -> Result<()> {
        backward([&mut self.backbone, &mut self.projector, &mut self.predictor], seams, gradients)
    }

    /// One step along the gradients gathered since the last one, which are then zero again. The
    /// predictor learns faster, by the factor in the table.
    ///
    /// - `learning_rate`: η, from a [`LearningRate`](crate::LearningRate).
    ///
    /// It does not check gradients: see [`Run::check_gradients`](crate::Run::check_gradients).
    pub fn step(&mut self, learning_rate: f64) -> Result<()> {
        let SgdTable { momentum, weight_decay, predictor_learning_rate_factor, .. } =
            self.optimizer;
        let rule = Sgd { learning_rate, momentum, weight_decay };
        self.backbone.step(rule)?;
        self.projector.step(rule)?;
        let learning_rate = learning_rate * predictor_learning_rate_factor;
        self.predictor.step(Sgd { learning_rate, ..rule })
    }

    /// The first parameter whose gradient is not finite, as `online.<segment>.<parameter>`.
    pub fn first_gradient_not_finite(&mut self) -> Result<Option<String>> {
        for segment in [&mut self.backbone, &mut self.projector, &mut self.predictor] {
            if let Some(name) = segment.first_gradient_not_finite()? {
                return Ok(Some(name));
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

/// Backbone and projector whose parameters are a moving average of the online network's. Their
/// batch-norm statistics come from their own forward passes.
pub struct Target {
    /// Picture to embedding.
    pub backbone: Segment,
    /// Embedding to projection.
    pub projector: Segment,
    groups: BatchGroups,
}

impl Target {
    /// A target that starts as a copy, statistics included.
    pub fn copy_of(online: &Online) -> Self {
        let Online { backbone, projector, .. } = online;
        let groups = backbone.groups().clone();
        Self { backbone: backbone.segment.clone(), projector: projector.segment.clone(), groups }
    }

    /// The same target on `device`.
    pub fn on(&self, device: &Device) -> Result<Self> {
        let (backbone, projector) = (self.backbone.on(device)?, self.projector.on(device)?);
        Ok(Self { backbone, projector, groups: self.groups.clone() })
    }

    /// Reads the target network from the `network.safetensors` in `folder`, or the online network
    /// if the method that trained it has no target. Also returns its name, `target` or `online`.
    ///
    /// # Errors
    ///
    /// The file is missing, damaged, or of another network than `encoder`.
    pub fn open(
        folder: &Path,
        encoder: &Encoder,
        precision: Precision,
    ) -> anyhow::Result<(Self, &'static str)> {
        let file = network_file::open(folder)?;
        let has_target = file.names().any(|name| name.starts_with("target."));
        let (found, [to_backbone, to_projector]) =
            if has_target { ("target", TARGET) } else { ("online", [ONLINE[0], ONLINE[1]]) };
        let norm = format!("{to_projector}.norm.weight");
        let with_norm = has_target || file.names().any(|name| name == norm);
        let empty = |plan: Network| Segment::empty(plan.with_precision(precision.into()));
        let mut backbone = empty(encoder.backbone_plan()?);
        let mut projector = empty(encoder.projector_plan(with_norm)?);
        let reading = || format!("reading the {found} network");
        network_file::load(&file, to_backbone, &mut backbone).with_context(reading)?;
        network_file::load(&file, to_projector, &mut projector).with_context(reading)?;
        Ok((Self { backbone, projector, groups: BatchGroups::one() }, found))
    }

    /// The projection `(N, P)` of each view, on the batch statistics of that view, not normalised. It is a
    /// constant of the loss: nothing is kept for a backward pass.
    ///
    /// - `views`: of the pictures of this rank. The projections have the rows of all ranks.
    ///
    /// # Errors
    ///
    /// A view does not have the backbone's shape.
    pub fn project<const VIEWS: usize>(
        &mut self,
        views: [&Tensor; VIEWS],
    ) -> Result<[Tensor; VIEWS]> {
        let modes = Modes::all(self.backbone.network(), Mode::Batch);
        let embeddings = self.backbone.forward_each(&views, &modes)?;
        let embeddings: Vec<&Tensor> = embeddings.iter().collect();
        let modes = Modes::all(self.projector.network(), Mode::Batch);
        let projections = self.projector.forward_each(&embeddings, &modes)?;
        let projections = projections.iter().map(|own| self.groups.all_rows(own));
        let projections: Vec<Tensor> = projections.collect::<Result<_>>()?;
        Ok(projections.try_into().expect("one of each view"))
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
    /// `online` is another network, or τ is not in `[0, 1]`.
    pub fn follow(&mut self, online: &Online, decay: f64) -> Result<()> {
        self.backbone.parameters.follow(&online.backbone.segment.parameters, decay)?;
        self.projector.parameters.follow(&online.projector.segment.parameters, decay)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use backbone::network_file::NamedTensor;
    use backbone::{Architecture, Depth, Predictor, Projector, Stem};
    use candle_core::Device::Cpu;
    use collective::Communicator;

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

    pub(crate) const SGD: SgdTable = SgdTable {
        peak_learning_rate: 0.05,
        predictor_learning_rate_factor: 10.,
        momentum: 0.9,
        weight_decay: 5e-4,
    };

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
        Learner::random(&tiny(), SGD, precision, seed)
    }

    fn all_gradients(online: &Online) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        for part in [&online.backbone, &online.projector, &online.predictor] {
            for entry in part.segment.parameters.entries() {
                all.extend(part.gradient(&entry.name)?);
            }
        }
        Ok(all)
    }

    /// A loss that uses all three seams, with weights that differ from row to row.
    fn loss_at_all_seams([embedding, projection, prediction]: &[Seam; 3]) -> Result<Tensor> {
        let weighted = |seam: &Tensor, salt: f32| -> Result<Tensor> {
            let count = seam.elem_count();
            let weights: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7 + salt).sin()).collect();
            (seam * Tensor::from_vec(weights, seam.shape(), &Cpu)?)?.sum_all()
        };
        let sum = (weighted(embedding, 1.)? + weighted(projection, 2.)?)?;
        sum + weighted(prediction, 3.)?
    }

    /// Backbone, projector or predictor, from 0.
    pub(crate) fn part(online: &mut Online, number: usize) -> &mut TrainedSegment<Sgd> {
        let Online { backbone, projector, predictor, .. } = online;
        [backbone, projector, predictor].into_iter().nth(number).expect("one of three")
    }

    #[test]
    fn gradients_through_all_seams_match_central_differences() -> anyhow::Result<()> {
        let mut online = learner(3)?.online;
        // The published first weights of the predictor are too small for differences in f32.
        let weights: Vec<f32> = (0..32).map(|i| (i as f32).sin()).collect();
        online.predictor.segment.parameters.set("output.weight", &weights)?;
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
            let part = part(&mut online, segment);
            let analytic = part.gradient(name)?;
            let values = part.segment.parameters.get(name)?;
            let largest = f64::from(analytic.iter().fold(0f32, |a, g| a.max(g.abs())));
            for place in [0, values.len() / 2, values.len() - 1] {
                let mut at = |change: f32| -> Result<f64> {
                    let mut changed = values.clone();
                    changed[place] += change;
                    self::part(&mut online, segment).segment.parameters.set(name, &changed)?;
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
        let [projection] = target.project([&view_2])?;
        let mut one_by_one = Vec::new();
        for view in [&view_1, &view_2] {
            let mut fresh = learner(3)?.online;
            let pass = fresh.forward(view, None)?;
            let gradients = regression_loss(&pass[2], &projection)?.backward()?;
            fresh.backward(pass, &gradients)?;
            one_by_one.push(all_gradients(&fresh)?);
        }
        let (pass_1, pass_2) = (online.forward(&view_1, None)?, online.forward(&view_2, None)?);
        for pass in [pass_1, pass_2] {
            let gradients = regression_loss(&pass[2], &projection)?.backward()?;
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
            let first = learner.online.backbone.segment.parameters.to_vec()?;
            let Learner { online, target } = &mut learner;
            let [projection] = target.project([&pictures(2)?])?;
            let pass = online.forward(&pictures(1)?, None)?;
            let gradients = regression_loss(&pass[2], &projection)?.backward()?;
            online.backward(pass, &gradients)?;
            online.step(0.05)?;
            target.follow(online, 0.9)?;
            let [projection] = target.project([&pictures(2)?])?;
            let projection = projection.flatten_all()?.to_vec1()?;
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
        assert_eq!(values(&plain[1])?, values(&noisy[1])?);
        assert_ne!(values(&plain[2])?, values(&noisy[2])?);
        Ok(())
    }

    /// BYOL steps with weights, momenta and statistics at the end, under their names in files.
    fn steps(learner: &mut Learner) -> anyhow::Result<Vec<NamedTensor>> {
        for step in 0..3 {
            let Learner { online, target } = &mut *learner;
            let [projection] = target.project([&pictures(step)?])?;
            let pass = online.forward(&pictures(10 + step)?, None)?;
            let loss = regression_loss(&pass[2], &projection)?;
            online.backward(pass, &loss.backward()?)?;
            assert_eq!(online.first_gradient_not_finite()?, None);
            online.step(0.05)?;
            target.follow(online, 0.9)?;
        }
        let floats = Checkpoint::of(learner)?;
        let tensor = |(name, shape, values): (&str, &[usize], &[f32])| NamedTensor {
            name: name.to_owned(),
            shape: shape.to_vec(),
            values: values.to_vec(),
        };
        Ok(floats.floats().map(tensor).collect())
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
        let Learner { mut online, mut target } = learner(3)?;
        target.backbone.parameters.set("bn1.bias", &[0., 0.])?;
        online.backbone.segment.parameters.set("bn1.bias", &[1., 2.])?;
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
        target.project([&pictures(1)?])?;
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

    /// Does `work` on threads of this process, one for each rank.
    fn on_ranks<R: Send>(
        ranks: usize,
        work: impl Fn(Communicator) -> anyhow::Result<R> + Sync,
    ) -> Vec<R> {
        let (ranks, work) = (Communicator::threads(ranks).expect("a power of two"), &work);
        std::thread::scope(|scope| {
            let start = |rank| {
                scope.spawn(move || {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
                    pool.install(|| work(rank))
                })
            };
            let threads: Vec<_> = ranks.into_iter().map(start).collect();
            let ends = threads.into_iter().map(|thread| thread.join().expect("no panic"));
            ends.collect::<anyhow::Result<_>>().expect("all ranks run")
        })
    }

    /// One backward pass, whose loss is multiplied by a factor.
    fn pass(
        learner: &mut Learner,
        groups: &BatchGroups,
        number: u64,
        factor: f64,
    ) -> anyhow::Result<()> {
        let own = |number| groups.own_rows(&pictures(number)?);
        let [projection] = learner.target.project([&own(number + 1)?])?;
        let seams = learner.online.forward(&own(number)?, None)?;
        let loss = (regression_loss(&seams[2], &projection)? * factor)?;
        Ok(learner.online.backward(seams, &loss.backward()?)?)
    }

    #[test]
    fn announced_passes_change_no_bit_on_any_number_of_ranks() -> anyhow::Result<()> {
        let steps = |precision, rank, announced| -> anyhow::Result<Vec<Vec<u32>>> {
            let groups = BatchGroups::new(4, rank)?;
            let mut learner = learner_in(precision, 3)?.in_groups(&groups)?;
            for number in [10, 20, 30] {
                if announced {
                    learner.online.expect_passes(2)?;
                }
                pass(&mut learner, &groups, number, 1.)?;
                pass(&mut learner, &groups, number + 5, 1.)?;
                assert_eq!(learner.online.first_gradient_not_finite()?, None);
                learner.online.step(0.05)?;
                learner.target.follow(&learner.online, 0.9)?;
            }
            let file = Checkpoint::of(&mut learner)?;
            let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect();
            Ok(file.floats().map(|(_, _, values)| bits(values)).collect())
        };
        for precision in [Precision::F32, Precision::Bf16] {
            let one = steps(precision, Communicator::single(), false)?;
            for ranks in [1, 2, 4] {
                for found in on_ranks(ranks, |rank| steps(precision, rank, true)) {
                    assert!(found == one, "{precision:?}, {ranks} ranks");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_pass_too_many_is_an_error_and_an_abandoned_step_holds_no_rank_up() {
        for ranks in [1, 2, 4] {
            on_ranks(ranks, |rank| {
                let groups = BatchGroups::new(4, rank)?;
                let mut learner = learner(3)?.in_groups(&groups)?;
                learner.online.expect_passes(1)?;
                pass(&mut learner, &groups, 10, f64::NAN)?;
                let error = pass(&mut learner, &groups, 20, 1.).expect_err("a second pass");
                assert!(error.to_string().contains("`expect_passes`"), "{error}");
                let found = learner.online.first_gradient_not_finite()?;
                assert_eq!(found.as_deref(), Some("online.backbone.conv1.weight"));
                // The run stops here: the sums of projector and predictor are not waited for.
                Ok(())
            });
        }
    }

    /// The gradients of one pass of the online network, before its step.
    fn gather(learner: &mut Learner, number: u64) -> anyhow::Result<()> {
        let [projection] = learner.target.project([&pictures(number + 1)?])?;
        let pass = learner.online.forward(&pictures(number)?, None)?;
        let gradients = regression_loss(&pass[2], &projection)?.backward()?;
        Ok(learner.online.backward(pass, &gradients)?)
    }

    #[test]
    fn steps_follow_the_rule_and_the_predictor_learns_faster() -> anyhow::Result<()> {
        for (segment, name, factor) in
            [(0, "layer2.0.conv1.weight", 1.), (1, "norm.bias", 1.), (2, "hidden.weight", 10.)]
        {
            let mut learner = learner(1)?;
            let value = |l: &mut Learner| part(&mut l.online, segment).segment.parameters.get(name);
            let gradient = |l: &mut Learner| part(&mut l.online, segment).gradient(name);
            gather(&mut learner, 10)?;
            let g_1 = gradient(&mut learner)?;
            let p_0 = value(&mut learner)?;
            learner.online.step(0.05)?;
            let p_1 = value(&mut learner)?;
            assert!(gradient(&mut learner)?.iter().all(|g| *g == 0.));
            gather(&mut learner, 20)?;
            let g_2 = gradient(&mut learner)?;
            learner.online.step(0.02)?;
            let p_2 = value(&mut learner)?;
            for i in 0..p_0.len() {
                let b_1 = g_1[i] + 5e-4 * p_0[i];
                let b_2 = 0.9 * b_1 + g_2[i] + 5e-4 * p_1[i];
                assert!((p_1[i] - (p_0[i] - 0.05 * factor * b_1)).abs() < 1e-6, "{name}[{i}]");
                assert!((p_2[i] - (p_1[i] - 0.02 * factor * b_2)).abs() < 1e-6, "{name}[{i}]");
            }
        }
        Ok(())
    }
}
