//! Whole runs on tiny pictures.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use backbone::network_file;
use candle_core::Device;
use fixture::Pictures;
use stage::Split;
use training::{Seam, TrainedSegment};

use super::*;
use crate::loss::information_loss;

/// Twenty-four pictures, bright on one of three sides, and a stage that reads them; every fourth is
/// for testing.
pub(crate) fn job(folder: &Path, out: &str) -> Job {
    let pixel = |number: usize, i: usize| {
        let bright = match number % 3 {
            0 => i % 7 < 3,
            1 => i % 7 > 3,
            _ => i / 7 > 2,
        };
        (40 + 150 * usize::from(bright) + i * i * (3 + number) % 61) as u8
    };
    let split = |number| if number % 4 == 3 { Split::Test } else { Split::Train };
    let data = fixture::data(3, &[Split::Train, Split::Test]);
    fixture::job("imc-swav", folder, out, Pictures { count: 24, pixel, split }, data)
}

pub(crate) fn config() -> Config {
    fixture::table(
        r#"
        classify-on = ["train"]
        prototypes = 12
        temperature = 0.1
        code-epsilon = 0.05
        code-rounds = 3
        entropy-weight = 4.0
        logit-limit = 5.0
        logit-penalty = 0.01
        evaluation = "refreshed-statistics"
        refresh-batches = 2
        kmeans-restarts = 2
        [run]
        epochs = 3
        batch-size = 8
        batch-groups = 1
        precision = "f32"
        save-every = 1
        collapse-deviation = 1e-6
        [optimizer]
        learning-rate = 5e-3
        beta-1 = 0.8
        beta-2 = 0.999
        epsilon = 1e-8
        weight-decay = 1e-5
        [schedule]
        warmup-steps = 3
        learning-rate-drops = [2]
        learning-rate-factor = 0.4
        [network]
        backbone = { depth = "10", width = 2, stem = "3x3" }
        projector = { hidden = 8, width = 4 }
        classifier = { hidden = 8 }
        [large]
        count = 2
        height = 6
        width = 7
        operations = [{ operation = "noise", deviation = 0.1 }]
        [small]
        count = 2
        height = 4
        width = 5
        operations = [{ operation = "resized-crop", scale = [0.3, 0.8], aspect = [0.75, 1.33] }]
        "#,
    )
}

/// The same with some other values.
pub(crate) fn with(change: impl FnOnce(&mut Config)) -> Config {
    let mut config = config();
    change(&mut config);
    config
}

fn bytes(job: &Job, name: &str) -> Vec<u8> {
    fs::read(job.out.join(name)).expect(name)
}

#[test]
fn ranks_write_the_same_bytes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = with(|c| c.run.batch_groups = 4);
    fixture::assert_same_on_ranks::<ImcSwav>(&config, |out| job(folder.path(), out));
    Ok(())
}

const OTHER: &str = "pseudo-labels-running-statistics.safetensors";

#[test]
fn equal_runs_are_equal_bytes_and_both_evaluations_are_written_under_their_names() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (first, again) = (job(folder.path(), "first"), job(folder.path(), "again"));
    ImcSwav::run(&config(), &first)?;
    ImcSwav::run(&config(), &again)?;
    for name in [network_file::NAME, PseudoLabels::FILE, OTHER] {
        assert!(bytes(&first, name) == bytes(&again, name), "{name}");
    }
    let other_seed = Job { seed: 4, ..job(folder.path(), "seed") };
    ImcSwav::run(&config(), &other_seed)?;
    assert!(bytes(&first, network_file::NAME) != bytes(&other_seed, network_file::NAME));

    // Asked for the other evaluation, the two files change places.
    let plain = job(folder.path(), "plain");
    ImcSwav::run(&Config { evaluation: Evaluation::RunningStatistics, ..config() }, &plain)?;
    let swapped = "pseudo-labels-refreshed-statistics.safetensors";
    assert!(bytes(&plain, PseudoLabels::FILE) == bytes(&first, OTHER));
    assert!(bytes(&plain, swapped) == bytes(&first, PseudoLabels::FILE));
    assert!(bytes(&first, PseudoLabels::FILE) != bytes(&first, OTHER));

    let labels = PseudoLabels::open(&first.out.join(PseudoLabels::FILE))?;
    assert_eq!((labels.index.len(), labels.clusters), (24, 3));
    // The head is the classifier as the network's file has it.
    let (head, network) = (data::head::open(&first.out)?, network_file::open(&first.out)?);
    assert_eq!((head.header_text("form")?, head.names().count()), ("classifier", 14));
    for name in head.names() {
        assert_eq!(head.f32(name)?, network.f32(&format!("classifier.{name}"))?, "{name}");
    }
    let line = &fixture::log(&first)[0];
    for name in ["swapped-prediction-loss", "entropy", "conditional-entropy", "logit-penalty"] {
        assert!(line[name].is_number(), "{name} is not in {line}");
    }
    Ok(())
}

/// Crops through the networks: seams and scores.
fn through(
    networks: &mut ImcSwavNetworks,
    crops: &[Tensor],
) -> Result<(Vec<[Seam; 2]>, Vec<Tensor>)> {
    let (mut seams, mut scores) = (Vec::new(), Vec::new());
    for pictures in crops {
        let of_crop = networks.forward(pictures)?;
        scores.push(networks.scores(&of_crop[1])?);
        seams.push(of_crop);
    }
    Ok((seams, scores))
}

/// A first batch through the networks, its scores, and the gradients of the encoder's loss.
fn one_step(
    networks: &mut ImcSwavNetworks,
) -> Result<(Vec<[Seam; 2]>, Vec<Tensor>, candle_core::backprop::GradStore)> {
    let folder = tempfile::tempdir()?;
    let job = job(folder.path(), "out");
    let images = Images::open(&job.images)?;
    let rows = images.rows(&job.data.train_on);
    let order = sampler::uniform(&rows, 8, 3, 0)?;
    let batch = config().views(&images, 3).epoch(0, order, 0)?.next().expect("a batch")?;
    networks.normalise_prototypes()?;
    let (crops, scores) = through(networks, &tensors(batch, &Device::Cpu)?)?;
    let codes = scores[..2].iter().map(|u| codes(u, 0.05, 3)).collect::<Result<Vec<_>>>()?;
    let gradients = swapped_prediction_loss(&scores, &codes, 0.1)?.backward()?;
    Ok((crops, scores, gradients))
}

/// IMC-SwAV written down once more: crop by crop and pair by pair.
#[test]
fn a_run_is_imc_swav() -> Result<()> {
    let folder = tempfile::tempdir()?;
    // A limit that the first logits pass already.
    let config = Config { logit_limit: 0.05, logit_penalty: 1., ..config() };
    let job = job(folder.path(), "out");
    ImcSwav::run(&config, &job)?;
    let written = network_file::open(&job.out)?;

    let images = Images::open(&job.images)?;
    let rows = images.rows(&job.data.train_on);
    let mut networks = ImcSwavNetworks::random(&config, 3, 3, None, &Device::Cpu)?;
    let views = config.views(&images, 3);
    let mut update = 0;
    for epoch in 0..3 {
        let order = sampler::uniform(&rows, 8, 3, epoch)?;
        for batch in views.epoch(epoch, order, 0)? {
            networks.normalise_prototypes()?;
            let (crops, scores) = through(&mut networks, &tensors(batch?, &Device::Cpu)?)?;
            assert_eq!(crops.len(), 4);
            // The classifier, on all 16 pairs; its gradients are its own.
            let mut seams = Vec::new();
            for crop in &crops {
                seams.push(networks.classifier.forward(&crop[0].detach())?);
            }
            let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu)?;
            for a in &seams {
                let logits = [(**a).clone()];
                for scores in &scores {
                    let scores = std::slice::from_ref(scores);
                    let pair = information_loss(&logits, scores, 0.1, 4.)?;
                    loss = (loss + (pair.loss / 16.)?)?;
                }
                loss = (loss + (logit_penalty(&logits, 0.05, 1.)? / 4.)?)?;
            }
            let gradients = loss.backward()?;
            for seam in seams {
                let at_logits = gradients.get(&seam).expect("a gradient").clone();
                networks.classifier.backward(seam, &at_logits, false)?;
            }
            // The rest: the codes of both large crops, predicted by every other one.
            let mut loss = Tensor::zeros((), candle_core::DType::F32, &Device::Cpu)?;
            for large in 0..2 {
                let code = [codes(&scores[large], 0.05, 3)?];
                for other in (0..4).filter(|&other| other != large) {
                    let pair = [scores[large].clone(), scores[other].clone()];
                    let term = swapped_prediction_loss(&pair, &code, 0.1)?;
                    loss = (loss + (term / 6.)?)?;
                }
            }
            let gradients = loss.backward()?;
            networks.backward(crops, &gradients)?;
            // Three updates of warm-up, in which the prototypes stand still; a drop at epoch 2.
            let rate = if update < 3 { (update + 1) as f64 / 3. } else { 1. };
            let rate = 5e-3 * rate * if epoch >= 2 { 0.4 } else { 1. };
            networks.step(&gradients, config.adam(rate), update >= 3, true)?;
            update += 1;
        }
    }
    assert_eq!(update, 6);
    let tensors = training::network_tensors(&mut networks)?;
    // Adam divides by the root of small squares: rounding shows.
    fixture::assert_written(&written, &tensors, 2e-3);
    Ok(())
}

/// What reaches the encoder through all crops is the slope of the loss along it.
#[test]
fn the_encoders_gradient_matches_central_differences() -> Result<()> {
    const WEIGHT: &str = "layer3.0.conv2.weight";
    let crop = |number: u64, rows: usize, columns: usize| -> Result<Tensor> {
        let noise = training::noise(1., (8, rows * columns), number, &[], &Device::Cpu)?;
        Ok(noise.context("a deviation above 0")?.reshape((8, rows, columns, 1))?)
    };
    let pictures = [crop(1, 6, 7)?, crop(2, 4, 5)?];
    let weights = training::noise(1., (8, 12), 3, &[], &Device::Cpu)?.context("above 0")?;
    let mut networks = ImcSwavNetworks::random(&config(), 3, 1, None, &Device::Cpu)?;
    let loss = |networks: &mut ImcSwavNetworks| -> Result<(Tensor, Vec<[Seam; 2]>)> {
        let (crops, scores) = through(networks, &pictures)?;
        let sum = (&scores[0] + (&scores[1] * 2.)?)?;
        Ok(((sum * &weights)?.sum_all()?, crops))
    };
    let (value, crops) = loss(&mut networks)?;
    networks.backward(crops, &value.backward()?)?;
    let gradient = networks.encoder.gradient(WEIGHT).context("a parameter")?.to_vec();
    let length = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
    let at = networks.encoder.segment.parameters.get(WEIGHT)?;
    let mut value_at = |h: f32| -> Result<f32> {
        let moved = at.iter().zip(&gradient).map(|(x, g)| x + h * g / length).collect::<Vec<_>>();
        networks.encoder.segment.parameters.set(WEIGHT, &moved)?;
        Ok(loss(&mut networks)?.0.to_scalar()?)
    };
    let slope = (value_at(1e-2)? - value_at(-1e-2)?) / 2e-2;
    assert!((slope - length).abs() < 0.02 * length, "{slope}, want {length}");
    Ok(())
}

fn is_zero(part: &TrainedSegment<layers::Adam>) -> Result<bool> {
    let mut all = part.segment.parameters.entries().iter();
    Ok(all.all(|entry| part.gradient(&entry.name).expect("there").iter().all(|g| *g == 0.)))
}

/// IMC-SwAV, case T12.
#[test]
fn each_loss_reaches_its_own_networks_and_no_other() -> Result<()> {
    let mut networks = ImcSwavNetworks::random(&config(), 3, 1, None, &Device::Cpu)?;
    let (crops, scores, _) = one_step(&mut networks)?;
    let mut bank = Bank::new(&Device::Cpu);
    let embeddings: Vec<Tensor> = crops.iter().map(|[embedding, _]| embedding.detach()).collect();
    bank.add(&embeddings, &scores, &[0, 1, 2, 3, 4, 5, 6, 7])?;
    let folder = tempfile::tempdir()?;
    let job = job(folder.path(), "run");
    let plan = config().plan(18);
    let mut run = Run::resume_or_start(&job, &config(), "images", plan, &mut networks)?;
    // Information: into the classifier alone. Its graph holds no prototype: scores are detached.
    classify(&config(), &mut networks, &bank, &mut run)?;
    assert!(!is_zero(&networks.classifier)?);
    assert!(is_zero(&networks.encoder)? && is_zero(&networks.projector)?);

    // Swapped prediction: into all but the classifier.
    let mut networks = ImcSwavNetworks::random(&config(), 3, 1, None, &Device::Cpu)?;
    let (crops, _, gradients) = one_step(&mut networks)?;
    let at_prototypes = gradients.get(&networks.prototypes.variable).expect("a gradient");
    assert!(at_prototypes.abs()?.sum_all()?.to_scalar::<f32>()? > 0.);
    networks.backward(crops, &gradients)?;
    assert!(is_zero(&networks.classifier)?);
    assert!(!is_zero(&networks.encoder)? && !is_zero(&networks.projector)?);
    Ok(())
}

/// As in the authors' program: see [`ImcSwavNetworks::step`].
#[test]
fn the_classifier_moves_on_between_batches_once_it_has_begun() -> Result<()> {
    let mut networks = ImcSwavNetworks::random(&config(), 3, 1, None, &Device::Cpu)?;
    let rule = config().adam(1e-2);
    let weights = |networks: &ImcSwavNetworks| networks.classifier.segment.parameters.to_vec();
    let step = |networks: &mut ImcSwavNetworks, classifies: bool| -> Result<bool> {
        let (crops, _, gradients) = one_step(networks)?;
        let input = crops[0][0].detach();
        networks.backward(crops, &gradients)?;
        if classifies {
            let seam = networks.classifier.forward(&input)?;
            let gradient = seam.ones_like()?;
            networks.classifier.backward(seam, &gradient, false)?;
        }
        let before = weights(networks)?;
        networks.step(&gradients, rule, true, classifies)?;
        Ok(before != weights(networks)?)
    };
    assert!(!step(&mut networks, false)?, "nothing was learnt yet");
    assert!(step(&mut networks, true)?);
    assert!(step(&mut networks, false)?, "its moments move it");
    Ok(())
}

/// IMC-SwAV, case T13: the prototypes.
#[test]
fn prototypes_stand_still_in_warm_up_but_for_their_length() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let prototypes = |config: &Config, out: &str| -> Result<Vec<f32>> {
        let job = job(folder.path(), out);
        ImcSwav::run(config, &job)?;
        network_file::open(&job.out)?.f32("prototypes")
    };
    let still = prototypes(&with(|c| c.schedule.warmup_steps = 6), "still")?;
    let mut first = ImcSwavNetworks::random(&config(), 3, 3, None, &Device::Cpu)?;
    for _ in 0..6 {
        first.normalise_prototypes()?;
    }
    assert_eq!(still, first.prototypes.variable.flatten_all()?.to_vec1::<f32>()?);
    assert_ne!(still, prototypes(&with(|c| c.schedule.warmup_steps = 5), "moved")?);
    Ok(())
}

#[test]
fn the_first_step_of_prototypes_is_adams_first() -> Result<()> {
    let mut networks = ImcSwavNetworks::random(&config(), 3, 1, None, &Device::Cpu)?;
    let adam = layers::Adam { weight_decay: 0., ..config().adam(0.01) };
    for moves in [false, false, true] {
        let (crops, _, gradients) = one_step(&mut networks)?;
        let prototypes = networks.prototypes.variable.clone();
        let before = prototypes.to_vec2::<f32>()?;
        let gradient = gradients.get(&prototypes).expect("a gradient").to_vec2::<f32>()?;
        networks.backward(crops, &gradients)?;
        networks.step(&gradients, adam, moves, false)?;
        let after = prototypes.to_vec2::<f32>()?;
        let values = before.iter().flatten().zip(after.iter().flatten());
        for ((before, after), gradient) in values.zip(gradient.iter().flatten()) {
            // With a bias correction that begins now, the step is the learning rate's length.
            let want = if moves { 0.01 * gradient.signum() } else { 0. };
            assert!((before - after - want).abs() < 1e-4 || gradient.abs() < 1e-6);
        }
    }
    Ok(())
}

#[test]
fn a_run_stopped_anywhere_ends_in_the_same_bytes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    // The classifier learns from the test split alone, so that its images gather over steps and
    // a checkpoint in mid-epoch holds some.
    let partly = with(|c| {
        c.run.batch_size = 4;
        c.classify_on = vec![Split::Test];
    });
    let on_both = |out: &str| {
        let mut job = job(folder.path(), out);
        job.data.train_on = vec![Split::Train, Split::Test];
        job
    };
    let whole = on_both("whole");
    ImcSwav::run(&partly, &whole)?;
    let images = Images::open(&whole.images)?;
    let rows = images.rows(&whole.data.train_on);
    let classified: BTreeSet<u32> = images.rows(&partly.classify_on).into_iter().collect();
    let order = sampler::uniform(&rows, 4, 3, 0)?;
    let gathered: Vec<usize> = order.iter().map(|b| places(b, &classified).len()).collect();
    assert!(gathered.iter().any(|&n| n > 0 && n < 4), "{gathered:?}");

    // A bank as it is between two steps comes back from the state.
    let stopped = on_both("stopped");
    let mut networks = ImcSwavNetworks::random(&partly, 3, 3, None, &Device::Cpu)?;
    let plan = partly.plan(rows.len());
    let fingerprint = images.fingerprint();
    let mut run = Run::resume_or_start(&stopped, &partly, fingerprint, plan, &mut networks)?;
    let (crops, scores, _) = one_step(&mut networks)?;
    let embeddings: Vec<Tensor> = crops.iter().map(|[embedding, _]| embedding.detach()).collect();
    networks.bank.add(&embeddings, &scores, &[1, 5, 6])?;
    let values = |bank: &Bank| -> Result<Vec<Vec<f32>>> {
        assert_eq!((bank.len(), bank.embeddings.len(), bank.scores.len()), (3, 4, 4));
        let values = |rows: &Tensor| Ok(rows.flatten_all()?.to_vec1()?);
        bank.embeddings.iter().chain(&bank.scores).map(values).collect()
    };
    let want = values(&networks.bank)?;
    for _ in 0..plan.steps_per_epoch {
        run.end_step(&mut networks)?;
    }
    run.end_epoch(&mut networks)?;
    networks.bank = Bank::new(&Device::Cpu);
    Run::resume_or_start(&stopped, &partly, fingerprint, plan, &mut networks)?;
    assert_eq!(values(&networks.bank)?, want);
    Ok(())
}

#[test]
fn the_encoder_starts_from_a_given_backbone_and_all_parts_are_written() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let still = with(|c| c.optimizer.learning_rate = 1e-30);
    let job = |out: &str| job(folder.path(), out);
    fixture::assert_starts_from_backbone::<ImcSwav>(job, &config(), &still);
    let file = network_file::open(&folder.path().join("given"))?;
    for prefix in ["online.backbone.", "online.projector.", "classifier.", "prototypes"] {
        assert!(file.names().any(|name| name.starts_with(prefix)), "{prefix}");
    }
    Ok(())
}

#[test]
fn advice_names_keys_of_the_table() {
    let training::Advice { divergence, collapse } = config().plan(20).advice;
    fixture::assert_names_keys([divergence, collapse], &config());
}

#[test]
fn every_experiment_of_the_project_has_a_usable_table() {
    fixture::assert_experiments_are_usable::<ImcSwav>();
}
