//! Embed: the embedding and the projection of every picture to score, by the trained target network;
//! or by the online network, if the method that trained it has no target.
//!
//! A [published network](backbone::published) has no projector: its projection is its embedding, scaled
//! to unit length.
//!
//! The network uses its running statistics, so that an embedding depends on its own picture alone.
//! The projection is scaled to unit length. Embeddings of a few augmented views are stored too, for a
//! clustering network that sees no pictures.
//!
//! Reads `images.safetensors`, and `network.safetensors` with `config.json` from the role
//! `network`; from the optional role `earlier` what an earlier run has embedded by the same published
//! network. Writes `embeddings.safetensors`, and for a published network `state.safetensors`. With
//! `pixels = true` it reads no network: small thumbnails of the pictures replace embedding and
//! projection, the baseline of every table.
//!
//! This stage trains nothing and knows no clusters.

mod known;
mod network;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use backbone::published::PublishedConfiguration;
use backbone::{Encoder, network_file};
use candle_core::{Device, Tensor};
use data::views::{Input, Pipeline};
use data::{EmbeddingWriter, Images};
use rand::Rng;
use serde::{Deserialize, Serialize};
use stage::digest::sha256_of_file;
use stage::progress::Unit;
use stage::{Effort, Job, Origin, Output, Ranks, Role, Spec, Stage};
use training::ops::unit_rows;
use training::{DividedBatches, Precision, Views};

use known::KnownEmbeddings;
use network::EmbeddingNetwork;

/// What embedding can vary. The experiment file sets every field.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    /// Pictures per forward pass; changes memory and time, not the result.
    pub batch_size: usize,
    /// Augmented views V of each picture.
    pub views: usize,
    /// Number type of activations and products; thumbnails are f32.
    pub precision: Precision,
    /// Thumbnails instead of a network's embeddings.
    pub pixels: bool,
    /// From a picture to an augmented view; may be milder than in training.
    pub augmentation: Pipeline,
}

impl Config {
    /// Finds what is wrong before anything runs.
    ///
    /// # Errors
    ///
    /// A value is out of range, the device does not exist, or the network's configuration,
    /// where it exists already, is not usable.
    pub fn check(&self, job: &Job) -> Result<Effort> {
        ensure!(self.batch_size > 0, "`batch-size` in `[embed]` is 0; it must be at least 1");
        self.augmentation.check("embed.augmentation")?;
        training::network_device(job.device)?;
        if self.pixels {
            return Ok(Effort::NONE);
        }
        if let Some(folder) = job.optional_input("network")
            && folder.join(backbone::CONFIGURATION).exists()
        {
            match PublishedConfiguration::find(folder)? {
                Some(published) => published.input::<Input>()?.check("input")?,
                None => Encoder::read(folder)?.input::<Input>()?.check("input")?,
            }
        }
        if !job.images.exists() {
            return Ok(Effort::NONE);
        }
        let rows = Images::open(&job.images)?.rows(&job.data.score_on).len();
        Ok(Effort::of_pictures((rows * self.views) as f64, rows as f64, 0.))
    }
}

/// The stage: see the documentation of the crate.
pub struct Embed;

impl Stage for Embed {
    const SPEC: Spec = Spec {
        name: "embed",
        algorithm: 6,
        inputs: &[Role::new("network", Origin::Network), Role::new("earlier", Origin::EarlierRun)],
        outputs: &[Output::Embeddings],
        ranks: Ranks::Any,
    };
    type Config = Config;

    fn check(config: &Config, job: &Job) -> Result<Effort> {
        config.check(job)
    }

    fn run(config: &Config, job: &Job) -> Result<()> {
        job.clear_log()?;
        let images = Images::of_job(job)?;
        let rows = images.rows(&job.data.score_on);
        ensure!(
            !rows.is_empty(),
            "`{}` has no picture of the splits {:?}; see `score-on` in table `[data]`",
            job.images.display(),
            job.data.score_on
        );
        let began = Instant::now();
        let (writer, views) = if config.pixels {
            (pixels(&images, &rows, job)?, 0)
        } else {
            (embeddings(config, &images, &rows, job)?, config.views)
        };
        let forwards = rows.len() * (1 + views);
        let seconds = began.elapsed().as_secs_f64();
        job.log(&serde_json::json!({
            "images": rows.len(),
            "views": views,
            "seconds": seconds,
            "images-per-second": forwards as f64 / seconds.max(1e-9),
        }))?;
        if let Some(writer) = writer {
            writer.finish(&job.out.join("embeddings.safetensors"), images.data_set(), &rows)?;
        }
        Ok(())
    }
}

/// Where the first rank keeps what it writes; `None` on the others.
fn writer(job: &Job, widths: [usize; 2], views: usize) -> Result<Option<EmbeddingWriter>> {
    let create = || EmbeddingWriter::create_in(&job.out, widths, views);
    job.communicator.is_first().then(create).transpose()
}

/// Embeddings by the network of the role `network`.
fn embeddings(
    config: &Config,
    images: &Images,
    rows: &[u32],
    job: &Job,
) -> Result<Option<EmbeddingWriter>> {
    let device = training::network_device(job.device)?;
    let mut network = EmbeddingNetwork::open(job.input("network")?, config.precision, &device)?;
    let input = network.input.clone();
    input.check("input")?;
    if let Some(warning) = input.stored_too_small(images.reduced_side()) {
        tracing::warn!("{warning}");
    }
    job.log(&serde_json::json!({ "network": network.found }))?;

    if config.views == 0 && network.is_published() {
        return published(config, images, rows, job, &mut network);
    }
    if job.communicator.size() > 1 {
        let network = sha256_of_file(&job.input("network")?.join(network_file::NAME))?;
        let read = [&network, images.fingerprint()].concat();
        job.check_agreement(&read, &format!("{} pictures", rows.len()))?;
    }
    // Draws for this purpose alone: those of training's epochs are other views.
    let seed = stage::random::stream(job.seed, "embed", &[job.round as u64]).next_u64();
    let batches: Vec<Vec<u32>> = rows.chunks(config.batch_size).map(<[u32]>::to_vec).collect();
    let mut progress = job.progress((rows.len() * (1 + config.views)) as u64, Unit::Images(1));
    let mut done = 0;
    // A signal may reach one rank alone.
    let mut count = |pictures: usize| -> Result<()> {
        done += pictures as u64;
        progress.at(done, "");
        job.check_interrupt()
    };
    let clean = Views::new(images, [&input.clean()], &input, seed);
    let clean = clean.epoch(0, batches.clone(), 0)?;
    let mut writer = writer(job, [network.width, network.projection_width], config.views)?;
    let mut clean = DividedBatches::new(clean, &device, &job.communicator)?;
    while let Some((batch, [embeddings, projections])) = clean.next(|pictures| {
        let (embedding, unit_projection) = network.embed(pictures)?;
        Ok([embedding, unit_projection])
    })? {
        if let Some(writer) = &mut writer {
            writer.push(&embeddings, &projections)?;
        }
        count(batch.len())?;
    }
    let augmented = Views::new(images, [&config.augmentation], &input, seed);
    for view in 1..=config.views {
        let pictures = augmented.epoch(view, batches.clone(), 0)?;
        let mut pictures = DividedBatches::new(pictures, &device, &job.communicator)?;
        while let Some((batch, [embeddings])) =
            pictures.next(|pictures| Ok([network.embedding(pictures)?]))?
        {
            if let Some(writer) = &mut writer {
                writer.push_views(&embeddings)?;
            }
            count(batch.len())?;
        }
    }
    Ok(writer)
}

/// Embeddings that are scaled to unit length together.
const ROWS_AT_ONCE: usize = 1024;

/// Longest work that an interruption or a crash may lose.
const BETWEEN_SAVES: Duration = Duration::from_secs(30);

/// Embeddings by a published network, without augmented views: only of the pictures that neither an
/// interrupted run nor an earlier one has embedded.
fn published(
    config: &Config,
    images: &Images,
    rows: &[u32],
    job: &Job,
    network: &mut EmbeddingNetwork,
) -> Result<Option<EmbeddingWriter>> {
    let identity =
        known::identity(job.input("network")?, config.precision, &job.device.to_string())?;
    let mut known = KnownEmbeddings::of_job(job, identity, network.width)?;
    let ids = rows.iter().map(|&row| images.stored_id(row)).collect::<Result<Vec<_>>>()?;
    let is_missing = |(_, id): &(&u32, &data::images::Id)| known.get(id).is_none();
    let missing: Vec<u32> = rows.iter().zip(&ids).filter(is_missing).map(|(&row, _)| row).collect();
    if job.communicator.size() > 1 {
        let place = format!("{} of {} pictures embedded", rows.len() - missing.len(), rows.len());
        let read = format!("{} {} {missing:?}", known.identity(), images.fingerprint());
        job.check_agreement(&read, &place)?;
    }
    job.log(&serde_json::json!({ "known": rows.len() - missing.len() }))?;
    embed_missing(config, images, &missing, job, network, &mut known)?;
    let Some(mut writer) = writer(job, [network.width; 2], 0)? else { return Ok(None) };
    let known = known.finish(job)?;
    for ids in ids.chunks(ROWS_AT_ONCE) {
        let mut embeddings = Vec::with_capacity(ids.len() * network.width);
        for id in ids {
            embeddings.extend_from_slice(known.get(id).context("every picture is embedded")?);
        }
        let rows = Tensor::from_slice(&embeddings, (ids.len(), network.width), &Device::Cpu)?;
        let projections: Vec<f32> = unit_rows(&rows)?.flatten_all()?.to_vec1()?;
        writer.push(&embeddings, &projections)?;
    }
    Ok(Some(writer))
}

/// Embeds the pictures in `missing`. The first rank adds them to `known` and saves them now and then.
fn embed_missing(
    config: &Config,
    images: &Images,
    missing: &[u32],
    job: &Job,
    network: &mut EmbeddingNetwork,
    known: &mut KnownEmbeddings,
) -> Result<()> {
    let device = training::network_device(job.device)?;
    let input = network.input.clone();
    let batches = missing.chunks(config.batch_size).map(<[u32]>::to_vec).collect();
    let pictures = Views::new(images, [&input.clean()], &input, job.seed).epoch(0, batches, 0)?;
    let mut batches = DividedBatches::new(pictures, &device, &job.communicator)?;
    let mut progress = job.progress(missing.len() as u64, Unit::Images(1));
    let mut saved = Instant::now();
    let mut done = 0;
    while let Some((batch, [embeddings])) =
        batches.next(|pictures| Ok([network.embedding(pictures)?]))?
    {
        done += batch.len() as u64;
        progress.at(done, "");
        let interrupted = job.check_interrupt();
        if job.communicator.is_first() {
            for (row, embedding) in batch.iter().zip(embeddings.chunks_exact(network.width)) {
                known.insert(images.stored_id(*row)?, embedding);
            }
            if interrupted.is_err() || saved.elapsed() > BETWEEN_SAVES {
                known.save(job)?;
                saved = Instant::now();
            }
        }
        interrupted?;
    }
    Ok(())
}

/// Thumbnails as both embedding and projection, without augmented views. Where pictures differ in
/// size, small ones are enlarged, as the input of a network is.
fn pixels(images: &Images, rows: &[u32], job: &Job) -> Result<Option<EmbeddingWriter>> {
    let mut all = None;
    if !job.communicator.is_first() {
        return Ok(all);
    }
    let sizes = rows.iter().map(|&row| images.size(row)).collect::<Result<Vec<_>>>()?;
    let size = data::thumbnail::common_size(sizes);
    for &row in rows {
        let values = data::thumbnail(&*images.picture(row)?, size).values;
        let widths = [values.len(); 2];
        let writer = match &mut all {
            Some(writer) => writer,
            None => all.insert(EmbeddingWriter::create_in(&job.out, widths, 0)?),
        };
        writer.push(&values, &values)?;
        job.interrupt.check()?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use backbone::published::{self, Provenance, PublishedArchitecture, PublishedNetwork};
    use backbone::{
        Architecture, Configuration, Depth, Predictor, Projector, Segment, Stem, network_file,
        resnet, write_configuration,
    };
    use candle_core::Device;
    use data::images::{self, StoredPicture};
    use data::views::{Filter, Operation};
    use data::{Embeddings, Loader, Picture};
    use fixture::transformer;
    use layers::{Mode, Modes, Positions, Resampling, Transformer, TransformerPlan};
    use stage::{DataTable, Interrupt, Interrupted, Library, Split};
    use training::{Learner, SgdTable, Target};

    use super::*;

    fn picture(number: u32, width: usize) -> Picture {
        let pixels = (0..6 * width as u32).map(|i| (i * i * (3 + number) % 251) as u8).collect();
        Picture::new(6, width, 1, pixels).expect("as many pixels")
    }

    /// A stage on ten pictures of 6 × 7 pixels, every third of them for testing, with a network.
    fn job(folder: &Path, widths: &[usize]) -> Result<Job> {
        let images = folder.join("images.safetensors");
        let source = |number: u32| {
            let width = widths[number as usize % widths.len()];
            let split = if number % 3 == 2 { Split::Test } else { Split::Train };
            Ok((StoredPicture::raw(picture(number, width), 1)?, split))
        };
        images::write(&images, 1, (0..10).map(source).collect::<Result<_>>()?)?;
        let input = Input {
            height: 6,
            width: 7,
            channels: 1,
            mean: vec![0.5],
            std: vec![0.25],
            clean: vec![],
        };
        let configuration = Configuration {
            backbone: Architecture { depth: Depth::Ten, width: 2, stem: Stem::Plain },
            projector: Projector { hidden: 8, width: 4 },
            predictor: Predictor { hidden: 8 },
            channels: 1,
            input: serde_json::to_value(input)?,
        };
        let optimizer = SgdTable {
            peak_learning_rate: 0.05,
            predictor_learning_rate_factor: 1.,
            momentum: 0.9,
            weight_decay: 0.,
        };
        let mut learner = Learner::random(&configuration, optimizer, Precision::F32, 1)?;
        network_file::write_tensors(folder, &training::network_tensors(&mut learner)?)?;
        configuration.write(folder)?;
        let data =
            DataTable { clusters: 2, train_on: vec![Split::Train], score_on: vec![Split::Train] };
        Ok(Job {
            inputs: BTreeMap::from([("network".to_owned(), folder.to_owned())]),
            seed: 3,
            ..Job::new("embed", images, folder, data)
        })
    }

    fn config() -> Config {
        Config {
            batch_size: 4,
            views: 2,
            precision: Precision::F32,
            pixels: false,
            augmentation: Pipeline { operations: vec![Operation::Noise { deviation: 0.3 }] },
        }
    }

    fn embedded(config: &Config, job: &Job) -> Result<Embeddings> {
        Embed::run(config, job)?;
        Embeddings::open(&job.out.join("embeddings.safetensors"))
    }

    fn log(job: &Job) -> Result<String> {
        Ok(std::fs::read_to_string(job.out.join("log.jsonl"))?)
    }

    #[test]
    fn embeddings_are_the_targets_for_the_scored_pictures_in_their_order() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), &[7])?;
        let found = embedded(&config(), &job)?;
        let images = Images::open(&job.images)?;
        assert_eq!(found.index, images.rows(&[Split::Train]));
        assert_eq!(found.data_set.fingerprint, images.fingerprint());
        assert_eq!((found.width, found.projection_width, found.views), (16, 4, 2));

        let (mut target, network) =
            Target::open(folder.path(), &Encoder::read(folder.path())?, Precision::F32)?;
        assert_eq!(network, "target");
        for (place, &row) in found.index.iter().enumerate() {
            let picture = images.picture(row)?;
            let values = picture.pixels.iter().map(|&p| (f32::from(p) / 255. - 0.5) / 0.25);
            let pictures =
                Tensor::from_vec(values.collect::<Vec<_>>(), (1, 6, 7, 1), &Device::Cpu)?;
            let (embedding, projection) = target.embed(&pictures)?;
            let near = |found: &[f32], want: Vec<f32>| {
                found.iter().zip(&want).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs().max(1.))
            };
            let embedding = embedding.flatten_all()?.to_vec1()?;
            assert!(near(&found.backbone[16 * place..16 * (place + 1)], embedding), "{row}");
            let projection = projection.flatten_all()?.to_vec1()?;
            assert!(near(&found.projection[4 * place..4 * (place + 1)], projection), "{row}");
        }
        Ok(())
    }

    /// As SeCu and IMC-SwAV leave them: other parts in `config.json`, projectors with and without
    /// batch norm.
    #[test]
    fn a_network_without_a_target_embeds_by_itself() -> Result<()> {
        for with_norm in [true, false] {
            let folder = tempfile::tempdir()?;
            let job = job(folder.path(), &[7])?;
            let encoder = Encoder::read(folder.path())?;
            let mut backbone = Segment::random("backbone", encoder.backbone_plan()?, 5)?;
            let projector = encoder.projector_plan(with_norm)?;
            let mut projector = Segment::random("projector", projector, 5)?;
            let segments = [("online.backbone", &backbone), ("online.projector", &projector)];
            network_file::write(folder.path(), &segments)?;
            let configuration = serde_json::json!({
                "backbone": encoder.backbone,
                "projector": encoder.projector,
                "heads": [3, 5],
                "channels": 1,
                "input": encoder.input,
            });
            write_configuration(folder.path(), &configuration)?;

            config().check(&job)?;
            let found = embedded(&config(), &job)?;
            let log = std::fs::read_to_string(job.out.join("log.jsonl"))?;
            assert!(log.contains(r#""network":"online""#), "{log}");
            let input = encoder.input::<Input>()?;
            let images = Images::open(&job.images)?;
            let batch = Loader::clean(&images, &found.index, &input)?.next().expect("a batch")?;
            let shape = batch.shape();
            let pictures = batch.views.into_iter().next().expect("a view");
            let pictures = Tensor::from_vec(pictures, shape, &Device::Cpu)?;
            let modes = |segment: &Segment| Modes::all(segment.network(), Mode::Running);
            let (of_backbone, of_projector) = (modes(&backbone), modes(&projector));
            let embedding = backbone.forward(&pictures, &of_backbone, None)?;
            let projection = projector.forward(&embedding, &of_projector, None)?;
            let projection = training::ops::unit_rows(&projection)?;
            for (found, want) in [(&found.backbone, embedding), (&found.projection, projection)] {
                let want = want.flatten_all()?.to_vec1::<f32>()?;
                assert_eq!(found.len(), want.len());
                for (got, want) in found.iter().zip(&want) {
                    assert!((got - want).abs() <= 1e-5 * want.abs().max(1.), "{got} {want}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_published_transformer_embeds_and_its_unit_embedding_is_the_projection() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let images = folder.path().join("images.safetensors");
        let source = |number: usize| {
            let pixels = (0..3 * 7 * 9).map(|i| (i * i * (3 + number) % 251) as u8).collect();
            Ok((StoredPicture::raw(Picture::new(7, 9, 3, pixels)?, 3)?, Split::Train))
        };
        images::write(&images, 3, (0..5).map(source).collect::<Result<_>>()?)?;
        let input = Input {
            height: 6,
            width: 6,
            channels: 3,
            mean: vec![0.4, 0.5, 0.6],
            std: vec![0.25; 3],
            clean: vec![Operation::Resize { pixels: 6, filter: Filter::Bicubic }],
        };
        let plan = TransformerPlan {
            registers: 1,
            positions: Positions::Absolute { grid: 3, resampling: Resampling::Antialias },
            ..transformer::narrow_plan(2)
        };
        let weights = transformer::weights(&plan);
        let network = PublishedNetwork::Transformer(Box::new(weights.clone()));
        published::write(folder.path(), &network, &input, Provenance::default())?;
        let data =
            DataTable { clusters: 2, train_on: vec![Split::Train], score_on: vec![Split::Train] };
        let job = Job {
            inputs: BTreeMap::from([("network".to_owned(), folder.path().to_owned())]),
            ..Job::new("embed", images, folder.path(), data)
        };
        config().check(&job)?;
        let augmentation = Pipeline {
            operations: [&input.clean[..], &[Operation::Flip { probability: 1. }]].concat(),
        };
        let config = Config { views: 1, augmentation, ..config() };
        let found = embedded(&config, &job)?;
        assert_eq!((found.index.len(), found.width, found.projection_width), (5, 8, 8));

        let transformer = Transformer::new(&weights, &Device::Cpu, layers::Precision::F32)?;
        let images = Images::open(&job.images)?;
        let batch = Loader::clean(&images, &found.index, &input)?.next().expect("a batch")?;
        let shape = batch.shape();
        let pictures = batch.views.into_iter().next().expect("a view");
        let pictures = Tensor::from_vec(pictures, shape, &Device::Cpu)?;
        let want = transformer.forward(&pictures)?.feature().to_vec2::<f32>()?;
        let mirrored = transformer.forward(&pictures.flip(&[2])?)?.feature().to_vec2::<f32>()?;
        assert_eq!(*found.backbone, want.concat());
        for (found, want) in found.backbone_views.iter().zip(mirrored.concat()) {
            assert!((found - want).abs() < 1e-5, "{found} {want}");
        }
        for (row, want) in found.projection.chunks(8).zip(&want) {
            let length = want.iter().map(|value| value * value).sum::<f32>().sqrt();
            for (found, want) in row.iter().zip(want) {
                assert!((found - want / length).abs() < 1e-6, "{found} {want}");
            }
        }
        // bf16 is close, and the size of a batch changes nothing.
        let narrow = embedded(&Config { precision: Precision::Bf16, ..config }, &job)?;
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
        for (one, other) in narrow.projection.chunks(8).zip(found.projection.chunks(8)) {
            assert!(dot(one, other) > 0.9995, "{}", dot(one, other));
        }
        Ok(())
    }

    /// Replaces the network in `folder` by a published residual one, whose width is 16.
    fn publish(folder: &Path, seed: u64) -> Result<(Segment, PublishedConfiguration)> {
        let architecture = Architecture { depth: Depth::Ten, width: 2, stem: Stem::Plain };
        let segment = Segment::random("backbone", resnet::plan(&architecture, 1)?, seed)?;
        network_file::write(folder, &[("online.backbone", &segment)])?;
        let input = match PublishedConfiguration::find(folder)? {
            Some(published) => published.input,
            None => Encoder::read(folder)?.input,
        };
        let configuration = PublishedConfiguration {
            published: PublishedArchitecture::Residual(architecture),
            channels: 1,
            input,
            provenance: Provenance::default(),
        };
        write_configuration(folder, &configuration)?;
        Ok((segment, configuration))
    }

    #[test]
    fn pictures_that_an_earlier_run_embedded_by_the_same_network_are_not_embedded_again()
    -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), &[7])?;
        publish(folder.path(), 5)?;
        let config = Config { views: 0, ..config() };
        let whole = embedded(&config, &job)?;

        // An earlier run of the first two pictures; one of its values is changed, so that it shows.
        let identity = || known::identity(folder.path(), config.precision, "cpu");
        let earlier = Job { out: folder.path().join("earlier"), ..job.clone() };
        std::fs::create_dir(&earlier.out)?;
        let images = Images::open(&job.images)?;
        let mut known = KnownEmbeddings::of_job(&earlier, identity()?, 16)?;
        known.insert(images.id(whole.index[0])?, &[0.5; 16]);
        known.insert(images.id(whole.index[1])?, &whole.backbone[16..32]);
        known.finish(&earlier)?;

        let inputs = BTreeMap::from([
            ("network".to_owned(), folder.path().to_owned()),
            ("earlier".to_owned(), earlier.out.clone()),
        ]);
        let again = Job { inputs, out: folder.path().join("again"), ..job.clone() };
        std::fs::create_dir(&again.out)?;
        let found = embedded(&config, &again)?;
        assert_eq!(found.backbone[..16], [0.5; 16]);
        assert_eq!(found.backbone[16..], whole.backbone[16..]);
        let unit = found.projection[..16].iter().map(|value| value * value).sum::<f32>();
        assert!((unit - 1.).abs() < 1e-6, "{unit}");

        // An interrupted run finds its own, and those of another network count for nothing.
        let resumed = Job { inputs: job.inputs.clone(), ..again.clone() };
        assert_eq!(embedded(&config, &resumed)?.backbone[..16], [0.5; 16]);
        publish(folder.path(), 6)?;
        let other = embedded(&config, &again)?;
        std::fs::remove_file(again.out.join("state.safetensors"))?;
        assert_eq!(other.backbone, embedded(&config, &resumed)?.backbone);
        assert_ne!(other.backbone[..16], [0.5; 16]);
        Ok(())
    }

    #[test]
    fn an_interrupted_run_keeps_each_part_and_ends_with_the_same_bytes() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), &[7])?;
        publish(folder.path(), 5)?;
        let config = Config { views: 0, batch_size: 2, ..config() };
        let whole = Job { out: folder.path().join("whole"), ..job.clone() };
        let parts =
            Job { out: folder.path().join("parts"), interrupt: Interrupt::default(), ..job };
        std::fs::create_dir(&whole.out)?;
        std::fs::create_dir(&parts.out)?;
        let pictures = embedded(&config, &whole)?.index.len();
        let whole_file = whole.out.join("embeddings.safetensors");

        parts.interrupt.raise();
        let part = |number: usize| parts.out.join(format!("known-{number}.safetensors"));
        let mut stops = 0;
        while let Err(error) = Embed::run(&config, &parts) {
            assert!(error.is::<Interrupted>(), "{error:#}");
            stops += 1;
            assert!(part(stops).exists() && !part(stops + 1).exists(), "one part after each batch");
        }
        assert_eq!(stops, pictures.div_ceil(2));
        assert!(!part(1).exists(), "the parts are gathered");
        for name in ["embeddings.safetensors", "state.safetensors"] {
            let bytes = |job: &Job| std::fs::read(job.out.join(name));
            assert!(bytes(&whole)? == bytes(&parts)?, "{name}");
        }
        // A damaged part is computed again, and no other.
        std::fs::remove_file(parts.out.join("state.safetensors"))?;
        for _ in 0..2 {
            Embed::run(&config, &parts).expect_err("interrupted");
        }
        std::fs::write(part(1), "damaged")?;
        let again = Job { interrupt: Interrupt::default(), ..parts.clone() };
        assert_eq!(embedded(&config, &again)?.backbone, Embeddings::open(&whole_file)?.backbone);
        assert!(log(&again)?.contains("\"known\":2"), "{}", log(&again)?);
        Ok(())
    }

    #[test]
    fn a_published_residual_network_embeds_without_a_projector() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), &[7])?;
        let (segment, configuration) = publish(folder.path(), 5)?;
        let found = embedded(&config(), &job)?;
        assert_eq!((found.width, found.projection_width, found.views), (16, 16, 2));
        let mut segment = segment;
        let images = Images::open(&job.images)?;
        let batch = Loader::clean(&images, &found.index, &configuration.input()?)?;
        let batch = batch.into_iter().next().expect("a batch")?;
        let shape = batch.shape();
        let pictures = batch.views.into_iter().next().expect("a view");
        let want = segment.infer(&Tensor::from_vec(pictures, shape, &Device::Cpu)?)?;
        for (found, want) in found.backbone.iter().zip(want.flatten_all()?.to_vec1::<f32>()?) {
            assert!((found - want).abs() <= 1e-5 * want.abs().max(1.), "{found} {want}");
        }
        Ok(())
    }

    #[test]
    fn views_differ_from_each_other_and_between_rounds_but_not_by_batch_size() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), &[7])?;
        let found = embedded(&config(), &job)?;
        let (first, second) = found.backbone_views.split_at(found.backbone.len());
        assert!(first != second && *first != *found.backbone);
        let larger = embedded(&Config { batch_size: 100, ..config() }, &job)?;
        assert!(found.backbone == larger.backbone && found.projection == larger.projection);
        assert!(found.backbone_views == larger.backbone_views);
        let later = embedded(&config(), &Job { round: 1, rounds: 1, ..job })?;
        assert!(found.backbone == later.backbone && found.backbone_views != later.backbone_views);
        Ok(())
    }

    #[test]
    fn ranks_write_the_same_bytes() -> Result<()> {
        // Batches of 3, 3 and 1 pictures: of four ranks, some have none.
        let network = Config { batch_size: 3, ..config() };
        let pixels = Config { pixels: true, ..config() };
        let published = Config { batch_size: 3, views: 0, ..config() };
        for (config, is_published) in [(network, false), (pixels, false), (published, true)] {
            let written = |ranks: usize| -> Result<_> {
                let folder = tempfile::tempdir()?;
                let job = job(folder.path(), &[7])?;
                if is_published {
                    publish(folder.path(), 5)?;
                }
                fixture::run_on_ranks::<Embed>(&config, &job, ranks);
                if is_published {
                    // What the first rank has saved is known to all.
                    std::fs::remove_file(job.out.join("embeddings.safetensors"))?;
                    fixture::run_on_ranks::<Embed>(&config, &job, ranks);
                    assert!(log(&job)?.contains("\"known\":7"), "{}", log(&job)?);
                }
                Ok(std::fs::read(job.out.join("embeddings.safetensors"))?)
            };
            let one = written(1)?;
            assert!(one == written(2)? && one == written(4)?);
        }
        Ok(())
    }

    #[test]
    fn pixels_need_no_network() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = Job { inputs: BTreeMap::new(), ..job(folder.path(), &[7])? };
        let config = Config { pixels: true, ..config() };
        let found = embedded(&config, &job)?;
        let images = Images::open(&job.images)?;
        let want: Vec<f32> = images
            .rows(&[Split::Train])
            .iter()
            .flat_map(|&row| images.picture(row).expect("a picture").pixels.clone())
            .map(|pixel| f32::from(pixel) / 255.)
            .collect();
        assert_eq!((found.width, found.views), (42, 0));
        for (found, want) in found.backbone.iter().zip(&want) {
            assert!((found - want).abs() < 1e-6);
        }
        assert_eq!(found.backbone, found.projection);

        let folder = tempfile::tempdir()?;
        let mixed = self::job(folder.path(), &[7, 9])?;
        let found = embedded(&config, &mixed)?;
        assert_eq!((found.width, found.index.len()), (6 * 9, 7), "the narrow ones are enlarged");
        Ok(())
    }

    #[test]
    fn missing_inputs_are_named_and_every_experiment_has_a_usable_table() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let job = job(folder.path(), &[7])?;
        config().check(&job)?;
        assert!(Config { batch_size: 0, ..config() }.check(&job).is_err());
        let without = Job { inputs: BTreeMap::new(), ..job.clone() };
        let message = Embed::run(&config(), &without).expect_err("no network").to_string();
        assert!(message.contains("--in network=DIR"), "{message}");
        let none = Job {
            data: DataTable { score_on: vec![Split::Unlabelled], ..job.data.clone() },
            ..job
        };
        let message = Embed::run(&config(), &none).expect_err("no picture").to_string();
        assert!(message.contains("score-on"), "{message}");

        for experiment in Library::in_folder("../../configs").experiments()? {
            if experiment.has_table("embed") {
                experiment.table::<Config>("embed")?.check(&without)?;
            }
        }
        Ok(())
    }
}
