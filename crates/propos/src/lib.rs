//! ProPos: from pictures to clusters in one stage, by turns of clustering and learning.
//!
//! The network is BYOL's: an online network predicts the projection that its moving average, the
//! target, computes from another view of the same image. After some epochs of BYOL alone two parts
//! are added. *Positive sampling*: the prediction starts from a sample near the online projection.
//! *Prototype scattering*: the means of the clusters in a batch are pushed apart, and each is kept
//! near its own in the target network. No two images are ever pushed apart, only clusters. Before
//! every epoch, k-means on the target's projections of all un-augmented images assigns the images to
//! clusters (Huang et al. 2023, arXiv:2111.11821: k-means is the E-step, learning the M-step). The
//! clusters that k-means finds after the last epoch are the result.
//!
//! Where the paper is silent, this follows the authors' program. On several devices that program
//! weakens scattering, which is a value here (`emulate-world-size`); once both views pass as one
//! batch, it also pairs most views with the labels of other images, which is not copied.
//!
//! - Reads `images.safetensors`, and from the optional role `backbone` a `backbone.safetensors` to
//!   start from.
//! - Writes `network.safetensors`, `backbone.safetensors`, `config.json`, `state.safetensors`,
//!   `pseudo-labels.safetensors`, `head.safetensors` (the centres of the last k-means), and
//!   `log.jsonl`, one object per epoch.
//!
//! Start at the `run` of [`ProPos`]; the loss is in [`objective`], the E-step in [`clusters`], the
//! values of an experiment in [`Config`].

pub mod clusters;
mod config;
pub mod objective;

use anyhow::Result;
use backbone::Segment;
use candle_core::Tensor;
use data::head::{self, CentreMetric};
use data::{Images, PseudoLabels};
use stage::{Effort, Job, Output, Ranks, Role, Spec, Stage};
use training::ops::{mean_length, sum};
use training::{Checkpoint, Learner, Run, Seam, Target, Trained, pictures};

pub use config::{Config, Sampling};

use crate::clusters::EStepClusters;
use crate::objective::{Direction, Extras, direction};

/// The stage: see the documentation of the crate.
pub struct ProPos;

impl Stage for ProPos {
    const SPEC: Spec = Spec {
        name: "propos",
        algorithm: 5,
        inputs: &[Role::BACKBONE],
        outputs: &[Output::Network, Output::PseudoLabels],
        ranks: Ranks::BatchGroups,
    };
    type Config = Config;

    fn check(config: &Config, job: &Job) -> Result<Effort> {
        config.check(job)
    }

    fn run(config: &Config, job: &Job) -> Result<()> {
        let images = Images::of_job(job)?;
        let device = training::network_device(job.device)?;
        let groups = config.run.groups(job)?; // Shared by the ranks.
        let rows = images.rows(&job.data.train_on);
        let plan = config.plan(rows.len());
        let learning_rate = config.learning_rate(plan.steps_per_epoch);
        let target_decay = config.target_decay(plan.steps_per_epoch);
        let configuration = config.network.configuration(&config.input)?;

        let mut learner =
            Learner::random(&configuration, config.optimizer, config.run.precision, job.seed)?;
        if let Some(folder) = job.optional_input("backbone") {
            learner.load_backbone(folder)?;
        }
        let clusters = EStepClusters::new(config, job, &images, rows, &device);
        let learner = learner.on(&device)?.in_groups(&groups)?;
        let joined = config.joined_views(plan.batch_size);
        let mut model = ProPosModel { learner, clusters };
        let mut run = Run::resume_or_start(job, config, images.fingerprint(), plan, &mut model)?;
        let views = config.views(&images, job.seed).in_groups(&groups);

        while let Some(epoch) = run.next_epoch() {
            // E-step: k-means on the target's projections of the un-augmented pictures.
            if run.batches_done() == 0 && epoch % config.reassign == 0 {
                model.clusters.find(&mut model.learner.target, &mut run)?;
            }
            // M-step: one pass over the images, balanced over the clusters if asked for.
            let extras = config.extras(epoch, job.data.clusters);
            let order = model.clusters.order(epoch)?;
            for batch in views.epoch(epoch, order, run.batches_done())? {
                let batch = batch?;
                let clusters = model.clusters.of(&batch.rows);
                let views = pictures(batch, &device)?;
                let Learner { online, target } = &mut model.learner;
                let passes = passes(joined, target, views)?;
                online.expect_passes(passes.len())?; // Ranks sum the gradients during the last one.
                for pass in passes {
                    run.note_projections(&pass.directions[0].1)?; // An error when they have collapsed.
                    let draw = [run.step() as u64, pass.number];
                    let noise = extras.noise(pass.shape()?, job.seed, draw, &device)?;
                    let scaled = |projection: &Tensor| {
                        let noise = noise.as_ref();
                        noise.map(|noise| extras.noise_space.scale(noise, projection)).transpose()
                    };
                    let seams = online.forward_perturbed(&pass.view, scaled)?;
                    let loss = pass.loss(&seams, &clusters, &extras, &mut run)?;
                    run.note_scalar("projection-length", &mean_length(&seams[1])?)?;
                    online.backward(seams, &loss.backward()?)?; // Adds to the gradients.
                }
                run.check_gradients(&device, || online.first_gradient_not_finite())?;
                online.step(learning_rate.at(run.step()))?;
                target.follow(online, target_decay.at(run.step()))?;
                run.end_step(&mut model)?; // Saves when the program is asked to stop.
            }
            run.end_epoch(&mut model)?; // Writes a log line, and a checkpoint when due.
        }
        run.finish(&mut model, &configuration)?;
        let found = clusters::result(config, job, &images, &mut model.learner.target, &device)?;
        if !job.communicator.is_first() {
            return Ok(()); // The first rank writes the result.
        }
        let by = CentreMetric::CosineSoftmax { temperature: clusters::CONFIDENCE_TEMPERATURE };
        head::write_centres(&job.out, &found.prototypes, job.data.clusters, by)?;
        PseudoLabels::of_one_phase(job, &images, found)?.write(&job.out.join(PseudoLabels::FILE))
    }
}

/// Everything that a checkpoint holds.
struct ProPosModel<'a> {
    learner: Learner,
    clusters: EStepClusters<'a>,
}

impl Trained for ProPosModel<'_> {
    fn checkpoint(&mut self, file: &mut Checkpoint) -> Result<()> {
        self.learner.checkpoint(file)?;
        self.clusters.checkpoint(file)
    }

    fn exported(&self) -> Option<&Segment> {
        self.learner.exported()
    }
}

/// One pass through the online network: of one view, or of both joined.
struct OnlinePass {
    /// 0 or 1: each pass has its own noise.
    number: u64,
    /// Of the images of this rank, `(N, H, W, C)`.
    view: Tensor,
    /// How `view` has both views, if it does.
    joined: Option<JoinedViews>,
    /// For each direction, which of the joined views it is of, and the target's projection of the other view.
    directions: Vec<(usize, Tensor)>,
}

/// The passes of a step: target projections first, on batch statistics and without a tape.
fn passes(
    joined: Option<JoinedViews>,
    target: &mut Target,
    [view_1, view_2]: [Tensor; 2],
) -> Result<Vec<OnlinePass>> {
    if let Some(views) = joined {
        let view = views.join([view_1, view_2])?;
        let [projection] = target.project([&view])?;
        let directions = vec![(0, views.of(1, &projection)?), (1, views.of(0, &projection)?)];
        return Ok(vec![OnlinePass { number: 0, view, joined, directions }]);
    }
    let [target_1, target_2] = target.project([&view_1, &view_2])?;
    Ok(vec![
        OnlinePass { number: 0, view: view_1, joined, directions: vec![(0, target_2)] },
        OnlinePass { number: 1, view: view_2, joined, directions: vec![(0, target_1)] },
    ])
}

/// Two views that pass through the networks as one batch: of each group of images view 1, then view 2. So each
/// rank passes both views of its own images, and the groups have the same rows on any number of ranks.
#[derive(Debug, Clone, Copy)]
struct JoinedViews {
    /// Images of a group, the same in all groups.
    images: usize,
}

impl JoinedViews {
    /// Both views of the images of this rank, each `(N, H, W, C)`, as one batch `(2N, H, W, C)`.
    fn join(&self, views: [Tensor; 2]) -> candle_core::Result<Tensor> {
        let (_, height, width, channels) = views[0].dims4()?;
        let of_group = self.images * height * width * channels;
        let [view_1, view_2] = views.map(|view| view.reshape(((), of_group)));
        Tensor::cat(&[view_1?, view_2?], 1)?.reshape(((), height, width, channels))
    }

    /// The rows of view `view`, 0 or 1, in the order of the images, `(N, D)`.
    ///
    /// - `rows`: of the joined views of all ranks, `(2N, D)`.
    fn of(&self, view: usize, rows: &Tensor) -> candle_core::Result<Tensor> {
        let width = rows.dim(1)?;
        let of_group = self.images * width;
        let groups = rows.reshape(((), 2 * of_group))?;
        groups.narrow(1, view * of_group, of_group)?.reshape(((), width))
    }
}

impl OnlinePass {
    /// Extents of the projections of this pass.
    fn shape(&self) -> Result<(usize, usize)> {
        // The view has the images of this rank alone.
        let rows = self.directions.iter().map(|(_, target)| target.dim(0));
        Ok((rows.sum::<candle_core::Result<usize>>()?, self.directions[0].1.dim(1)?))
    }

    /// The share of this pass in the step's loss, which is the mean of both directions.
    fn loss(
        &self,
        [_, projection, prediction]: &[Seam; 3],
        clusters: &[Option<u32>],
        extras: &Extras,
        run: &mut Run,
    ) -> Result<Tensor> {
        let mut losses = Vec::new();
        for (view, target) in &self.directions {
            let rows = |seam: &Tensor| match self.joined {
                Some(views) => views.of(*view, seam),
                None => Ok(seam.clone()),
            };
            let (prediction, projection) = (rows(prediction)?, rows(projection)?);
            let Direction { loss, alignment, scatter } =
                direction(&prediction, &projection, target, clusters, extras)?;
            run.note_scalar("alignment-loss", &alignment)?;
            if let Some(scatter) = scatter {
                run.note_scalar("scatter-loss", &scatter)?;
            }
            run.note_loss(&loss)?; // An error when it is not finite.
            losses.push((loss * 0.5)?);
        }
        Ok(sum(losses)?)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use anyhow::{Context as _, ensure};
    use assignment::k_means;
    use backbone::network_file;
    use candle_core::Device::Cpu;
    use data::Loader;
    use fixture::{Pictures, log, network};
    use stage::{DeviceChoice, Split};
    use training::loss::regression_loss;
    use training::sampler;
    use training::scatter::{Absent, scatter_loss};

    use super::*;
    use crate::config::tests::published;
    use crate::objective::NoiseSpace;

    /// Twenty-four pictures of three kinds, and a stage that reads them.
    pub(crate) fn job(folder: &Path, out: &str) -> Job {
        let split = |number| if number < 21 { Split::Train } else { Split::Test };
        let pictures = Pictures { count: 24, pixel: fixture::of_three_kinds, split };
        let data = fixture::data(3, &[Split::Train, Split::Test]);
        fixture::job("propos", folder, out, pictures, data)
    }

    pub(crate) fn config() -> Config {
        let mut config = published();
        (config.run.epochs, config.run.batch_size, config.run.save_every) = (3, 8, 1);
        config.run.collapse_deviation = 1e-6;
        config.optimizer.peak_learning_rate = 0.5;
        (config.schedule.warmup_epochs, config.schedule.target_decay) = (1., 0.9);
        Config { byol_epochs: 1, kmeans_restarts: 2, noise: 0.3, emulate_world_size: 1, ..config }
    }

    /// The same with some other values.
    fn with(change: impl FnOnce(&mut Config)) -> Config {
        let mut config = config();
        change(&mut config);
        config
    }

    #[test]
    fn equal_runs_are_equal_bytes_and_every_value_changes_them() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let first = job(folder.path(), "first");
        let bytes = network::<ProPos>(&config(), &first);
        assert!(bytes == network::<ProPos>(&config(), &job(folder.path(), "again")));
        let seed = Job { seed: 4, ..job(folder.path(), "seed") };
        assert!(bytes != network::<ProPos>(&config(), &seed));
        for (name, other) in [
            ("noise", Config { noise: 0.2, ..config() }),
            ("space", Config { noise_space: NoiseSpace::Unit, ..config() }),
            ("weight", Config { scatter_weight: 0.2, ..config() }),
            ("world", Config { emulate_world_size: 2, ..config() }),
            ("temperature", Config { scatter_temperature: 0.4, ..config() }),
            ("joined", Config { concatenate_views: true, ..config() }),
            ("decay", with(|c| c.schedule.last_target_decay = 0.9)),
            ("sampling", Config { sampling: Sampling::Uniform, ..config() }),
        ] {
            assert!(bytes != network::<ProPos>(&other, &job(folder.path(), name)), "{name}");
        }
        Ok(())
    }

    #[test]
    fn ranks_write_the_same_bytes() -> Result<()> {
        let folder = tempfile::tempdir()?;
        for concatenate_views in [false, true] {
            let config =
                with(|c| (c.run.batch_groups, c.concatenate_views) = (4, concatenate_views));
            let job = |out: &str| job(folder.path(), &format!("{out}, {concatenate_views}"));
            fixture::assert_same_on_ranks::<ProPos>(&config, job);
        }
        Ok(())
    }

    /// ProPos, case 13: the switch after the epochs of BYOL.
    #[test]
    fn extras_change_no_bit_before_their_epoch_and_appear_in_it() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let uniform = Config { sampling: Sampling::Uniform, ..config() };
        let never = Config { byol_epochs: 3, ..uniform.clone() };
        let without = Config { byol_epochs: 0, noise: 0., scatter_weight: 0., ..uniform.clone() };
        let byol = job(folder.path(), "byol");
        assert!(
            network::<ProPos>(&never, &job(folder.path(), "never"))
                == network::<ProPos>(&without, &byol)
        );

        let switched = job(folder.path(), "switched");
        ProPos::run(&uniform, &switched)?;
        let (plain, switched) = (log(&byol), log(&switched));
        assert_eq!(plain[0]["loss"], switched[0]["loss"]);
        assert!(switched[0].get("scatter-loss").is_none());
        assert_ne!(plain[1]["loss"], switched[1]["loss"]);
        for epoch in [1, 2] {
            assert!(switched[epoch]["scatter-loss"].as_f64() > Some(0.), "epoch {epoch}");
            assert!(plain[epoch].get("scatter-loss").is_none());
        }
        Ok(())
    }

    /// ProPos written down once more: one loss over both views, each against the target of the
    /// other and with the clusters of its own images.
    #[test]
    fn a_run_is_propos() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let config = Config { sampling: Sampling::Uniform, ..config() };
        let job = job(folder.path(), "out");
        ProPos::run(&config, &job)?;
        let written = network_file::open(&job.out)?;

        let images = Images::open(&job.images)?;
        let rows = images.rows(&[Split::Train]);
        let mut learner = Learner::random(
            &config.network.configuration(&config.input)?,
            config.optimizer,
            config.run.precision,
            3,
        )?;
        let (rate, decay) = (config.learning_rate(2), config.target_decay(2));
        let views = config.views(&images, 3);
        let Learner { online, target } = &mut learner;
        let mut step = 0;
        for epoch in 0..3 {
            let mut projections = Vec::new();
            for batch in Loader::clean(&images, &rows, &config.input)? {
                let mut batch = batch?;
                let pictures = batch.views.remove(0);
                let (_, rows) =
                    target.embed(&Tensor::from_vec(pictures, batch.shape_of(0), &Cpu)?)?;
                projections.extend(rows.flatten_all()?.to_vec1::<f32>()?);
            }
            let found = k_means(&projections, rows.len(), 4, &config.k_means(3), 3)?;
            let order = sampler::uniform(&rows, 8, 3, epoch)?;
            for batch in views.epoch(epoch, order, 0)? {
                step += 1;
                let batch = batch?;
                let place = |row: &u32| rows.iter().position(|other| other == row);
                let clusters: Vec<Option<u32>> =
                    batch.rows.iter().map(|row| Some(found.assignment[place(row)?])).collect();
                let [view_1, view_2] = pictures(batch, &Cpu)?;
                let extras = epoch > 0; // byol-epochs is 1.
                let noise = |pass: u64| {
                    let deviation = if extras { 0.3 } else { 0. };
                    training::noise(deviation, (8, 4), 3, &[step as u64, pass], &Cpu)
                };
                let [target_1, target_2] = target.project([&view_1, &view_2])?;
                let pass_1 = online.forward(&view_1, noise(0)?.as_ref())?;
                let pass_2 = online.forward(&view_2, noise(1)?.as_ref())?;
                let mut loss = (regression_loss(&pass_1[2], &target_2)?
                    + regression_loss(&pass_2[2], &target_1)?)?;
                if extras {
                    let absent = Absent::Constant { clusters: 3, logit: -10. };
                    let scatter = |own: &Tensor, other: &Tensor| {
                        scatter_loss(own, other, &clusters, 0.5, absent)
                    };
                    let both = (scatter(&pass_1[1], &target_2)? + scatter(&pass_2[1], &target_1)?)?;
                    loss = (loss + (both * 0.1)?)?;
                }
                let gradients = (loss / 2.)?.backward()?;
                online.backward(pass_1, &gradients)?;
                online.backward(pass_2, &gradients)?;
                online.step(rate.at(step))?;
                target.follow(online, decay.at(step))?;
            }
        }
        fixture::assert_written(&written, &training::network_tensors(&mut learner)?, 1e-5);
        Ok(())
    }

    #[test]
    fn clusters_are_found_when_due_and_the_result_is_that_of_the_last_network() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), "out");
        let config = Config { reassign: 2, ..config() };
        ProPos::run(&config, &job)?;
        let found: Vec<bool> = log(&job).iter().map(|line| line.get("inertia").is_some()).collect();
        assert_eq!(found, [true, false, true]);

        let labels = PseudoLabels::open(&job.out.join(PseudoLabels::FILE))?;
        assert_eq!(labels.index, (0..24).collect::<Vec<u32>>());
        assert_eq!(labels.assignment, labels.kmeans_assignment);
        assert!(labels.confidence.iter().all(|confidence| (1. / 3. ..=1.).contains(confidence)));
        // Written again by the network as it was saved: nothing was trained after that.
        let images = Images::open(&job.images)?;
        let configuration = config.network.configuration(&config.input)?;
        let (mut target, _) =
            Target::open(&job.out, &configuration.encoder(), config.run.precision)?;
        let again = clusters::result(&config, &job, &images, &mut target, &Cpu)?;
        assert_eq!(again.assignment, labels.assignment);
        assert_eq!(again.prototypes, labels.prototypes);
        let head = head::open(&job.out)?;
        assert_eq!(head.header_text("form")?, "centres");
        // `predict` computes the confidence of the run: the softmax at .1.
        assert_eq!(CentreMetric::of(&head)?, CentreMetric::CosineSoftmax { temperature: 0.1 });
        assert_eq!(head.shape("centres")?, [3, config.network.projector.width]);
        assert_eq!(head.f32("centres")?, labels.prototypes);
        Ok(())
    }

    /// The loss of a step, by the online and target networks of a fresh learner.
    fn loss(config: &Config, views: [Tensor; 2], clusters: &[Option<u32>]) -> Result<f64> {
        Ok(step(config, views, clusters)?.0)
    }

    /// The same, and the gradient of the backbone's last convolution.
    fn step(
        config: &Config,
        views: [Tensor; 2],
        clusters: &[Option<u32>],
    ) -> Result<(f64, Vec<f32>)> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), "out");
        let mut learner = Learner::random(
            &config.network.configuration(&config.input)?,
            config.optimizer,
            config.run.precision,
            5,
        )?
        .in_groups(&config.run.groups(&job)?)?;
        let mut run = Run::resume_or_start(&job, config, "f", config.plan(8), &mut learner)?;
        let Learner { mut online, mut target } = learner;
        // A target that is not the online network, or both directions would be alike.
        target.projector.parameters.set("output.bias", &[0.3, -0.2, 0.5, -0.6])?;
        let mut sum = 0.;
        let all = passes(config.joined_views(8), &mut target, views)?;
        let extras = Extras { noise: 0., ..config.extras(9, 3) };
        for pass in all {
            let seams = online.forward(&pass.view, None)?;
            let loss = pass.loss(&seams, clusters, &extras, &mut run)?;
            sum += f64::from(loss.to_scalar::<f32>()?);
            online.backward(seams, &loss.backward()?)?;
        }
        assert_eq!(online.first_gradient_not_finite()?, None);
        Ok((sum, online.backbone.gradient("layer4.0.conv2.weight")?))
    }

    fn views_of_eight() -> Result<[Tensor; 2]> {
        let view = |seed| -> Result<Tensor> {
            let values = training::noise(1., (8, 42), seed, &[], &Cpu)?;
            Ok(values.context("a deviation above 0")?.reshape((8, 6, 7, 1))?)
        };
        Ok([view(1)?, view(2)?])
    }

    const CLUSTERS: [Option<u32>; 8] =
        [Some(0), Some(1), Some(1), Some(2), Some(0), Some(2), Some(2), Some(2)];

    /// ProPos, case 14.
    #[test]
    fn swapped_views_and_renamed_clusters_leave_the_loss_as_it_is() -> Result<()> {
        for concatenate_views in [false, true] {
            let config = Config { concatenate_views, scatter_weight: 1., ..config() };
            let [view_1, view_2] = views_of_eight()?;
            let plain = loss(&config, [view_1.clone(), view_2.clone()], &CLUSTERS)?;
            let swapped = loss(&config, [view_2.clone(), view_1.clone()], &CLUSTERS)?;
            ensure!((plain - swapped).abs() < 1e-5, "{plain} and {swapped}");
            let renamed = CLUSTERS.map(|cluster| cluster.map(|cluster| (cluster + 1) % 3));
            let renamed = loss(&config, [view_1, view_2], &renamed)?;
            ensure!((plain - renamed).abs() < 1e-5, "{plain} and {renamed}");
        }
        Ok(())
    }

    /// Gotcha 2 of the specification: views that pass as one batch meet their own clusters.
    #[test]
    fn joined_views_are_paired_with_the_clusters_of_their_images() -> Result<()> {
        let config = Config { concatenate_views: true, scatter_weight: 1., ..config() };
        let [view_1, view_2] = views_of_eight()?;
        let Learner { mut online, mut target } = Learner::random(
            &config.network.configuration(&config.input)?,
            config.optimizer,
            config.run.precision,
            5,
        )?;
        target.projector.parameters.set("output.bias", &[0.3, -0.2, 0.5, -0.6])?;
        let joined = Tensor::cat(&[&view_1, &view_2], 0)?;
        let pass = online.forward(&joined, None)?;
        let [projection] = target.project([&joined])?;
        let extras = Extras { noise: 0., ..config.extras(9, 3) };
        let half = |first: usize, other: usize| -> Result<f64> {
            let (prediction, own) = (pass[2].narrow(0, first, 8)?, pass[1].narrow(0, first, 8)?);
            let target = projection.narrow(0, other, 8)?;
            let loss = direction(&prediction, &own, &target, &CLUSTERS, &extras)?.loss;
            Ok(f64::from(loss.to_scalar::<f32>()?))
        };
        let want = (half(0, 8)? + half(8, 0)?) / 2.;
        let got = loss(&config, [view_1, view_2], &CLUSTERS)?;
        ensure!((got - want).abs() < 1e-6, "{got} and {want}");
        Ok(())
    }

    /// Both views of four groups of two images have the loss and the gradients of one batch of all.
    #[test]
    fn joined_views_in_groups_learn_what_they_learn_in_one() -> Result<()> {
        let config = |groups| {
            with(|c| {
                (c.concatenate_views, c.scatter_weight, c.run.batch_groups) = (true, 1., groups)
            })
        };
        let (whole, want) = step(&config(1), views_of_eight()?, &CLUSTERS)?;
        let (grouped, got) = step(&config(4), views_of_eight()?, &CLUSTERS)?;
        ensure!((whole - grouped).abs() < 1e-5, "{whole} and {grouped}");
        let length =
            |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
        let off = length(&mut want.iter().zip(&got).map(|(a, b)| a - b));
        let size = length(&mut want.iter().copied());
        ensure!(want != got && off < 1e-3 * size, "off by {off} of {size}");
        Ok(())
    }

    #[test]
    fn joined_views_are_in_order_within_each_group() -> Result<()> {
        let view = |first: f32| Tensor::arange(first, first + 4., &Cpu)?.reshape((4, 1, 1, 1));
        for (images, want) in
            [(4, [0f32, 1., 2., 3., 10., 11., 12., 13.]), (2, [0., 1., 10., 11., 2., 3., 12., 13.])]
        {
            let views = JoinedViews { images };
            let joined = views.join([view(0.)?, view(10.)?])?;
            assert_eq!(joined.dims(), [8, 1, 1, 1]);
            let rows = joined.reshape((8, 1))?;
            assert_eq!(rows.flatten_all()?.to_vec1::<f32>()?, want);
            for (number, first) in [(0, 0.), (1, 10.)] {
                let found = views.of(number, &rows)?.flatten_all()?.to_vec1::<f32>()?;
                assert_eq!(found, [first, first + 1., first + 2., first + 3.]);
            }
        }
        Ok(())
    }

    #[test]
    fn online_and_target_start_from_a_given_backbone() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let still = with(|c| {
            c.optimizer.peak_learning_rate = 1e-30;
            c.schedule.target_decay = 1.;
            c.optimizer.weight_decay = 0.;
        });
        let job = |out: &str| job(folder.path(), out);
        fixture::assert_starts_from_backbone::<ProPos>(job, &config(), &still);
        Ok(())
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_runs() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), "out");
        config().check(&job)?;
        let wrong = [
            (with(|c| c.run.batch_size = 1), "batch-size"),
            (with(|c| c.run.epochs = 0), "epochs"),
            (Config { reassign: 0, ..config() }, "reassign"),
            (Config { kmeans_restarts: 0, ..config() }, "kmeans-restarts"),
            (Config { kmeans_iterations: 0, ..config() }, "kmeans-iterations"),
            (Config { emulate_world_size: 0, ..config() }, "emulate-world-size"),
            (Config { noise: -1., ..config() }, "noise"),
            (Config { scatter_weight: f64::NAN, ..config() }, "scatter-weight"),
            (Config { scatter_temperature: 0., ..config() }, "scatter-temperature"),
            (Config { absent_logit: f64::NAN, ..config() }, "absent-logit"),
            (with(|c| c.schedule.last_target_decay = 0.5), "last-target-decay"),
            (with(|c| c.schedule.warmup_epochs = 3.), "warmup-epochs"),
            (
                with(|c| {
                    (c.concatenate_views, c.run.batch_groups, c.run.batch_size) = (true, 4, 10);
                }),
                "concatenate-views",
            ),
        ];
        fixture::assert_refused::<ProPos>(&job, wrong);
        config().check(&Job { device: DeviceChoice::Cuda(None), ..job }).expect_err("no CUDA");
        Ok(())
    }

    #[test]
    fn advice_names_keys_of_the_table() {
        let training::Advice { divergence, collapse } = config().plan(20).advice;
        fixture::assert_names_keys([divergence, collapse], &config());
    }

    #[test]
    fn every_experiment_of_the_project_has_a_usable_table() {
        fixture::assert_experiments_are_usable::<ProPos>();
    }
}
