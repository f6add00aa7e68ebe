//! SeCu: from pictures to clusters in one phase, with centres that only their own images move.
//!
//! One network has several heads; each is a set of centres on the unit sphere and a cluster for
//! every image. The network learns toward the clusters of the epoch before and toward its prediction
//! for the other view, among a copy of the centres that is frozen for an epoch. A centre learns from
//! the images assigned to it alone, most from the hard ones; plain cross-entropy would let every
//! image push every other centre, and diverges. A constraint on the assignment keeps all clusters in
//! use, by size or by entropy (stable cluster discrimination, Qian 2023, arXiv:2311.14310). The head
//! with the number of clusters that the experiment asks for gives the result; training runs no
//! k-means.
//!
//! This is the authors' program for small pictures. Their variant for ImageNet, with a predictor and
//! LARS, is not implemented, nor is the self-labelling that some published figures include. Their
//! blur approximates a Gaussian by three box filters, ours is a Gaussian.
//!
//! - Reads `images.safetensors`, and from the optional role `backbone` a `backbone.safetensors` to
//!   start from.
//! - Writes `network.safetensors` (`online.backbone`, `online.projector`, and the raw centres of
//!   each head as `heads.<number>.centres`), `backbone.safetensors`, `config.json`,
//!   `state.safetensors`, `pseudo-labels.safetensors`, `head.safetensors` (the unit-length centres
//!   of the head that gives the result), and `log.jsonl`, one object per epoch.
//!
//! Start at the `run` of [`SeCu`]; a step of a head is [`heads::SeCuHead::step`], its losses are in
//! [`loss`], the assignment in [`constraint`], the values of an experiment in [`Config`].

mod config;
pub mod constraint;
pub mod heads;
pub mod loss;
pub mod monitor;
pub mod network;

use anyhow::Result;
use assignment::{KMeans, argmax_rows, k_means_on_ranks};
use candle_core::{Device, Tensor};
use candle_nn::ops::softmax;
use data::head::{self, CentreMetric};
use data::{Found, Images, Loader, PseudoLabels};
use stage::{Effort, Job, Output, Ranks, Role, Spec, Stage};
use training::ops::unit_rows;
use training::{Run, outputs, pictures, sampler};

pub use config::Config;

use crate::heads::SeCuHead;
use crate::monitor::{distinct, mean_cosine};
use crate::network::SeCuNetworks;

/// The stage: see the documentation of the crate.
pub struct SeCu;

impl Stage for SeCu {
    const SPEC: Spec = Spec {
        name: "secu",
        algorithm: 6,
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
        let places = places(&rows, images.len());
        let main = config.head(job)?;
        let warm_epochs = config.schedule.still_epochs + config.schedule.warmup_epochs;
        let plan = config.plan(rows.len());
        let learning_rate = config.learning_rate(plan.steps_per_epoch);

        let start = job.optional_input("backbone");
        let networks = SeCuNetworks::random(config, rows.len(), start, job.seed, &device)?;
        let mut networks = networks.in_groups(&groups)?;
        let mut run = Run::resume_or_start(job, config, images.fingerprint(), plan, &mut networks)?;
        let views = config.views(&images, job.seed).in_groups(&groups);

        while let Some(epoch) = run.next_epoch() {
            if run.batches_done() == 0 {
                // The network's loss sees these copies of the centres until the epoch ends.
                networks.heads.iter_mut().try_for_each(SeCuHead::freeze)?;
            }
            let order = sampler::every(&rows, config.run.batch_size, job.seed, epoch)?;
            for batch in views.epoch(epoch, order, run.batches_done())? {
                let batch = batch?;
                let places: Vec<usize> =
                    batch.rows.iter().map(|&row| places[row as usize]).collect();
                let [view_1, view_2] = pictures(batch, &device)?;
                let (seams_1, seams_2) = (networks.forward(&view_1)?, networks.forward(&view_2)?);
                let directions = [unit_rows(&seams_1[1])?, unit_rows(&seams_2[1])?];
                run.note_projections(&directions[0])?; // An error when they have collapsed.
                run.note_scalar("mean-cosine", &mean_cosine(&directions[0])?)?;

                // Every head assigns the batch and computes both losses: means over heads and views.
                let (mut for_network, mut for_centres) = (Vec::new(), Vec::new());
                for (number, head) in networks.heads.iter_mut().enumerate() {
                    let [one, other] = &directions;
                    let found = head.step([one, other], &places, epoch, config.temperatures())?;
                    if number == main {
                        // Before warm-up ends, the network cannot tell images apart yet.
                        let distinct = match epoch < warm_epochs {
                            true => distinct(&found.ids),
                            false => networks.monitor.look(&found.ids)?, // An error at a collapse.
                        };
                        run.note("distinct-ids", distinct as f64);
                    }
                    for_network.push(found.representation_loss);
                    for_centres.push(found.centre_loss);
                }
                let (for_network, for_centres) = (mean(&for_network)?, mean(&for_centres)?);
                run.note_scalar("representation-loss", &for_network)?;
                run.note_scalar("centre-loss", &for_centres)?;
                let loss = (for_network + for_centres)?; // They share no parameter.
                run.note_loss(&loss)?; // An error when it is not finite.

                let gradients = loss.backward()?;
                networks.expect_passes(2)?; // Ranks sum the gradients during the last one.
                networks.backward(seams_1, &gradients)?; // Adds to the gradients.
                networks.backward(seams_2, &gradients)?;
                run.check_gradients(&device, || networks.first_gradient_not_finite(&gradients))?;
                networks.step(&gradients, learning_rate.at(run.step()), config.centre_rule())?;
                run.end_step(&mut networks)?; // Saves when the program is asked to stop.
            }
            run.note("largest-cluster", networks.heads[main].largest_share()?);
            run.end_epoch(&mut networks)?; // Writes a log line, and a checkpoint when due.
        }
        run.finish(&mut networks, &config.configuration())?;
        let found = result(config, job, &images, &mut networks, main, &device)?;
        if !job.communicator.is_first() {
            return Ok(()); // The first rank writes the result.
        }
        let by = CentreMetric::CosineSoftmax { temperature: config.temperature };
        head::write_centres(&job.out, &found.prototypes, job.data.clusters, by)?;
        PseudoLabels::of_one_phase(job, &images, found)?.write(&job.out.join(PseudoLabels::FILE))
    }
}

/// The result: the nearest centre of the main head by cosine, for the un-augmented images to score.
/// The confidence is the softmax at the network's temperature, as in training. For comparison, it
/// has the clusters of k-means on the same projections too.
fn result(
    config: &Config,
    job: &Job,
    images: &Images,
    networks: &mut SeCuNetworks,
    main: usize,
    device: &Device,
) -> Result<Found> {
    let rows = images.rows(&job.data.score_on);
    let centres = networks.heads[main].directions()?.detach();
    let (width, clusters) = (config.network.projector.width, job.data.clusters);
    let loader = Loader::clean(images, &rows, &config.input)?;
    let [projections, memberships] = outputs(loader, device, &job.communicator, |pictures| {
        let directions = networks.project(pictures)?;
        let similarity = directions.matmul(&centres.t()?)?;
        let memberships = softmax(&(similarity / config.temperature)?, 1)?;
        Ok([directions, memberships])
    })?;
    let (assignment, confidence) = argmax_rows(&memberships, clusters)?;
    let (restarts, ranks) = (KMeans::spherical(clusters, 10), &job.communicator);
    let k_means = k_means_on_ranks(&projections, rows.len(), width, &restarts, job.seed, ranks)?;
    Ok(Found {
        assignment,
        kmeans_assignment: k_means.assignment,
        confidence,
        projection_width: width,
        prototypes: centres.flatten_all()?.to_vec1()?,
    })
}

/// Maps each row of the images file to its index in `rows`, or `usize::MAX` if absent.
fn places(rows: &[u32], images: usize) -> Vec<usize> {
    let mut places = vec![usize::MAX; images];
    rows.iter().enumerate().for_each(|(place, &row)| places[row as usize] = place);
    places
}

/// The mean of scalars.
fn mean(losses: &[Tensor]) -> Result<Tensor> {
    Ok(Tensor::stack(losses, 0)?.mean_all()?)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;

    use backbone::network_file;
    use fixture::Pictures;
    use stage::{DeviceChoice, Split};

    use super::*;
    use crate::constraint::Constraint;

    /// Twenty-three pictures of three kinds, and a stage that reads them.
    fn job(folder: &Path, out: &str) -> Job {
        let split = |number| if number < 19 { Split::Train } else { Split::Test };
        let pictures = Pictures { count: 23, pixel: fixture::of_three_kinds, split };
        let data = fixture::data(3, &[Split::Test, Split::Train]);
        fixture::job("secu", folder, out, pictures, data)
    }

    pub(crate) fn config() -> Config {
        fixture::table(
            r#"
            heads = [3, 5]
            temperature = 0.05
            centre-temperature = 0.1
            assigned-share = 0.2
            constraint = { rule = "size", lower-bound = 0.9, rate = 0.1 }
            least-distinct-ids = 1
            views-1 = { operations = [{ operation = "noise", deviation = 0.2 }] }
            views-2 = { operations = [{ operation = "flip", probability = 0.5 }] }
            [run]
            epochs = 4
            batch-size = 8
            batch-groups = 1
            precision = "f32"
            save-every = 1
            collapse-deviation = 1e-6
            [optimizer]
            learning-rate = 0.2
            centre-learning-rate = 0.8
            momentum = 0.9
            weight-decay = 1e-4
            [schedule]
            still-epochs = 1
            warmup-epochs = 1
            [network]
            backbone = { depth = "10", width = 2, stem = "3x3" }
            projector = { hidden = 8, width = 4 }
            "#,
        )
    }

    /// The same with some other values.
    fn with(change: impl FnOnce(&mut Config)) -> Config {
        let mut config = config();
        change(&mut config);
        config
    }

    /// Some weights and centres of a short run. If it has not learnt to tell the images apart, its
    /// result is an error after the networks are written.
    fn weights(config: &Config, job: &Job) -> Vec<f32> {
        if let Err(error) = SeCu::run(config, job) {
            assert!(error.to_string().contains("one cluster"), "{error:#}");
        }
        let file = network_file::open(&job.out).expect("written");
        NAMES.map(|name| file.f32(name).expect("there")).concat()
    }

    /// The same of networks.
    fn weights_of(networks: &mut SeCuNetworks) -> Vec<f32> {
        let tensors = training::network_tensors(networks).expect("read");
        let values = |name| tensors.iter().find(|tensor| tensor.name == name).expect("there");
        NAMES.map(|name| values(name).values.clone()).concat()
    }

    const NAMES: [&str; 2] = ["online.backbone.layer3.0.conv2.weight", "heads.0.centres"];

    /// Large and long enough to tell the three kinds apart.
    fn able() -> Config {
        let mut able = config();
        (able.run.epochs, able.optimizer.learning_rate, able.network.backbone.width) = (40, 0.1, 8);
        (able.network.projector.hidden, able.network.projector.width) = (32, 16);
        able
    }

    #[test]
    fn equal_runs_are_equal_bytes_and_every_value_changes_them() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let first = weights(&config(), &job(folder.path(), "first"));
        assert_eq!(first, weights(&config(), &job(folder.path(), "again")));
        let seed = Job { seed: 4, ..job(folder.path(), "seed") };
        assert_ne!(first, weights(&config(), &seed));
        let size = |lower_bound, rate| Constraint::Size { lower_bound, rate };
        for (name, other) in [
            ("centres", with(|c| c.optimizer.centre_learning_rate = 0.4)),
            ("still", with(|c| c.schedule.still_epochs = 0)),
            ("heads", Config { heads: vec![3], ..config() }),
            ("temperature", Config { temperature: 0.1, ..config() }),
            ("centre temperature", Config { centre_temperature: 0.05, ..config() }),
            ("share", Config { assigned_share: 0.5, ..config() }),
            ("rate", Config { constraint: size(0.9, 5.), ..config() }),
            ("entropy", Config { constraint: Constraint::Entropy { weight: 19. }, ..config() }),
            ("views", Config { views_2: config().views_1, ..config() }),
        ] {
            assert_ne!(first, weights(&other, &job(folder.path(), name)), "{name}");
        }
        Ok(())
    }

    #[test]
    fn ranks_write_the_same_bytes() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let mut config = able();
        // Batches of 5, 5, 5 and 4.
        (config.run.batch_groups, config.run.batch_size) = (4, 5);
        fixture::assert_same_on_ranks::<SeCu>(&config, |out| job(folder.path(), out));
        Ok(())
    }

    /// SeCu written down once more, views backwards, and one loss over all heads.
    #[test]
    fn a_run_is_secu() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (config, job) = (config(), job(folder.path(), "out"));
        let found = weights(&config, &job);

        let images = Images::open(&job.images)?;
        let rows = images.rows(&job.data.train_on);
        let mut networks = SeCuNetworks::random(&config, rows.len(), None, job.seed, &Device::Cpu)?;
        let learning_rate = config.learning_rate(3); // Batches of 8, 8 and 3.
        let views = config.views(&images, job.seed);
        let mut steps = 0;
        for epoch in 0..config.run.epochs {
            networks.heads.iter_mut().try_for_each(SeCuHead::freeze)?;
            let order = sampler::every(&rows, 8, job.seed, epoch)?;
            for batch in views.epoch(epoch, order, 0)? {
                let batch = batch?;
                steps += 1;
                let place = |row: &u32| rows.iter().position(|other| other == row);
                let places = batch.rows.iter().map(place).collect::<Option<Vec<_>>>();
                let places = places.expect("rows that are trained on");
                let [view_1, view_2] = pictures(batch, &Device::Cpu)?;
                let (view_1, view_2) = (networks.forward(&view_1)?, networks.forward(&view_2)?);
                let (of_1, of_2) = (unit_rows(&view_1[1])?, unit_rows(&view_2[1])?);
                let mut sum = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu)?;
                for head in &mut networks.heads {
                    let found = head.step([&of_2, &of_1], &places, epoch, config.temperatures())?;
                    sum = ((sum + found.representation_loss)? + found.centre_loss)?;
                }
                let gradients = (sum / config.heads.len() as f64)?.backward()?;
                networks.backward(view_2, &gradients)?;
                networks.backward(view_1, &gradients)?;
                networks.step(&gradients, learning_rate.at(steps), config.centre_rule())?;
            }
        }
        let want = weights_of(&mut networks);
        assert_eq!(found.len(), want.len());
        for (found, want) in found.iter().zip(&want) {
            assert!((found - want).abs() <= 1e-4 * want.abs().max(1.), "{found} {want}");
        }
        Ok(())
    }

    /// Gotcha 5 of the specification: a first epoch in which only the centres move.
    #[test]
    fn the_network_stands_still_while_the_centres_find_their_places() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let config = with(|c| {
            c.run.epochs = 1;
            c.schedule.still_epochs = 1;
            c.schedule.warmup_epochs = 0;
            c.optimizer.learning_rate = 0.2;
        });
        let job = job(folder.path(), "out");
        let found = weights(&config, &job);
        let images = Images::open(&job.images)?;
        let count = images.rows(&job.data.train_on).len();
        let mut fresh = SeCuNetworks::random(&config, count, None, job.seed, &Device::Cpu)?;
        let before = weights_of(&mut fresh);
        let count = before.len() - 3 * 4; // Of the weight alone.
        assert_eq!(found[..count], before[..count]);
        assert_ne!(found[count..], before[count..]);
        Ok(())
    }

    #[test]
    fn the_result_is_of_the_head_that_is_asked_for_and_of_all_scored_images() -> Result<()> {
        let folder = tempfile::tempdir()?;
        for (out, heads) in [("first", vec![3, 5]), ("last", vec![5, 3])] {
            let job = job(folder.path(), out);
            let config = Config { heads, ..able() };
            SeCu::run(&config, &job)?;
            let labels = PseudoLabels::open(&job.out.join(PseudoLabels::FILE))?;
            assert_eq!((labels.clusters, labels.index.len()), (3, 23));
            assert_eq!((labels.projection_width, labels.prototypes.len()), (16, 48));
            for line in fixture::log(&job) {
                assert!((1. ..=3.).contains(&line["distinct-ids"].as_f64().expect("a number")));
                let cosine = line["mean-cosine"].as_f64().expect("a number");
                assert!((-1.0..=1.0001).contains(&cosine), "{cosine}");
            }

            // Assigned again by the network as it was saved.
            let images = Images::open(&job.images)?;
            let mut networks = SeCuNetworks::random(&config, 19, None, 99, &Device::Cpu)?;
            training::load_network(&job.out, &mut networks)?;
            let main = config.head(&job)?;
            let again = result(&config, &job, &images, &mut networks, main, &Device::Cpu)?;
            assert_eq!(again.assignment, labels.assignment);
            assert_eq!(again.confidence, labels.confidence);
            let head = head::open(&job.out)?;
            assert_eq!(head.header_text("form")?, "centres");
            let temperature = config.temperature;
            assert_eq!(CentreMetric::of(&head)?, CentreMetric::CosineSoftmax { temperature });
            assert_eq!(head.f32("centres")?, again.prototypes);
        }
        Ok(())
    }

    #[test]
    fn a_run_whose_batches_hold_one_cluster_stops() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let strict = with(|c| {
            c.schedule.warmup_epochs = 0;
            c.least_distinct_ids = 4;
        });
        let error = SeCu::run(&strict, &job(folder.path(), "out")).expect_err("at most 3 of 3");
        assert!(error.is::<stage::Diverged>(), "{error}");
        Ok(())
    }

    #[test]
    fn a_backbone_from_elsewhere_is_where_it_starts() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let given = weights(&able(), &job(folder.path(), "given"));
        let mut from = job(folder.path(), "from");
        from.inputs.insert("backbone".into(), folder.path().join("given"));
        // At a rate of nearly nothing, what comes in goes out.
        let mut still = able();
        (still.optimizer.learning_rate, still.run.epochs) = (1e-30, 3);
        let found = weights(&still, &from);
        let count = 32 * 32 * 9; // Of the weight alone; the centres have moved.
        assert_eq!(found[..count], given[..count]);
        assert_ne!(found[count..], given[count..]);
        from.inputs.insert("backbone".into(), folder.path().join("none"));
        let message = format!("{:#}", SeCu::run(&still, &from).expect_err("no such file"));
        assert!(message.contains("backbone.safetensors"), "{message}");
        Ok(())
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_runs() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), "out");
        config().check(&job)?;
        let wrong = [
            (with(|c| c.run.batch_size = 1), "batch-size"),
            (with(|c| c.run.batch_groups = 4), "a batch has 3 images"),
            (with(|c| c.run.epochs = 0), "epochs"),
            (with(|c| c.schedule.warmup_epochs = 3), "warmup-epochs"),
            (with(|c| c.optimizer.learning_rate = 0.), "learning-rate"),
            (with(|c| c.optimizer.centre_learning_rate = -1.), "centre-learning-rate"),
            (with(|c| c.optimizer.momentum = 1.), "momentum"),
            (with(|c| c.optimizer.weight_decay = -1.), "weight-decay"),
            (Config { heads: vec![4, 5], ..config() }, "heads"),
            (Config { heads: vec![3, 1], ..config() }, "heads"),
            (Config { temperature: 0., ..config() }, "temperature"),
            (Config { centre_temperature: f64::NAN, ..config() }, "centre-temperature"),
            (Config { assigned_share: 1.5, ..config() }, "assigned-share"),
            (Config { constraint: Constraint::Entropy { weight: -1. }, ..config() }, "weight"),
        ];
        fixture::assert_refused::<SeCu>(&job, wrong);
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
        fixture::assert_experiments_are_usable::<SeCu>();
    }
}
