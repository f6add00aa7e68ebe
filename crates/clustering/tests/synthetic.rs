//! The whole stage on embeddings whose clusters are known.

use std::path::Path;

use anyhow::Result;
use assignment::{KMeans, Metric};
use clustering::head::{Head, HeadShape};
use clustering::learner::learner;
use clustering::{Clustering, Config, Features, KMeansMetric, Previous, cluster, fit, reliability};
use data::head::CentreMetric;
use data::images::{self, StoredPicture};
use data::{DataSet, Embeddings, Picture, PseudoLabels};
use rand::RngExt;
use rand_distr::{Distribution, StandardNormal};
use stage::container::Floats;
use stage::{DataTable, Job, Split, Stage, Status};

const CLUSTERS: usize = 4;
const WIDTH: usize = 16;
const VIEWS: usize = 4;

/// Unit rows around four orthonormal centres, with views around each row.
struct Synthetic {
    labels: Vec<u32>,
    features: Features,
}

fn synthetic(count: usize, noise: f64, seed: u64) -> Synthetic {
    let mut rng = stage::random::stream(seed, "synthetic", &[]);
    let labels: Vec<u32> = (0..count).map(|_| rng.random_range(0..CLUSTERS as u32)).collect();
    let mut near = |centre: &[f64], noise: f64| -> Vec<f64> {
        let row: Vec<f64> = centre
            .iter()
            .map(|c| {
                let draw: f64 = StandardNormal.sample(&mut rng);
                c + noise * draw
            })
            .collect();
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.into_iter().map(|x| x / length).collect()
    };
    let rows: Vec<Vec<f64>> = labels
        .iter()
        .map(|&label| {
            let mut centre = [0.0; WIDTH];
            centre[label as usize] = 1.0;
            near(&centre, noise)
        })
        .collect();
    let views: Vec<f32> = (0..VIEWS)
        .flat_map(|_| rows.iter().flat_map(|row| near(row, 0.1)).collect::<Vec<_>>())
        .map(|x| x as f32)
        .collect();
    let rows: Vec<f32> = rows.into_iter().flatten().map(|x| x as f32).collect();
    let rows = Floats::from(rows);
    let backbone_views = views.into();
    let features = Features { count, backbone: rows.clone(), projection: rows, backbone_views };
    Synthetic { labels, features }
}

fn config() -> Config {
    Config {
        heads: 2,
        hidden: 64,
        kmeans_restarts: 10,
        kmeans_iterations: 300,
        kmeans_metric: KMeansMetric::Spherical,
        neighbours: 20,
        batch_size: 512,
        start_epochs: 10,
        epochs: 100,
        least_steps: 250,
        learning_rate: 1e-3,
        entropy_weight: 5.0,
        reliable_share: Some([0.5, 0.9]),
        reliable_confidence: None,
    }
}

fn job(out: &Path, round: usize) -> Job {
    let data = DataTable { clusters: CLUSTERS, train_on: vec![], score_on: vec![] };
    Job { round, rounds: 2, ..Job::new("clustering", "images.safetensors", out, data) }
}

/// Share of images in the right cluster under the best numbering.
fn accuracy(assignment: &[u32], labels: &[u32]) -> f64 {
    let map = assignment::optimal_map(assignment, labels, CLUSTERS).expect("four clusters");
    let right = assignment.iter().zip(labels).filter(|(a, l)| map[**a as usize] == **l).count();
    right as f64 / labels.len() as f64
}

/// The specification's end-to-end case: a tenth of the neighbours are anyone, one network of 16,
/// 64 and 4 units starts from k-means. Its plain reference, over three seeds, has accuracy .975 to
/// .976 by k-means, .974 by the network, and at least .998 inside the reliable half.
#[test]
fn a_tenth_of_the_neighbours_may_be_anyone() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = Config { heads: 1, ..config() };
    let k_means = KMeans {
        clusters: CLUSTERS,
        metric: Metric::Spherical,
        restarts: config.kmeans_restarts,
        iterations: config.kmeans_iterations,
        tolerance: 1e-4,
    };
    for (noise, seed) in [(0.3, 0), (0.3, 1), (0.3, 2), (0.225, 0)] {
        let Synthetic { labels, features } = synthetic(2000, noise, seed);
        let rows = &features.projection;
        let kmeans = assignment::k_means(rows, 2000, WIDTH, &k_means, seed)?.assignment;
        let mut neighbours = assignment::nearest_neighbours(rows, 2000, WIDTH, config.neighbours)?;
        let mut rng = stage::random::stream(seed, "anyone", &[]);
        for neighbour in &mut neighbours {
            if rng.random_range(0..10u32) == 0 {
                *neighbour = rng.random_range(0..2000);
            }
        }

        let job = Job { seed, ..job(folder.path(), 0) };
        let trained = fit::train(&config, &features, &kmeans, &neighbours, None, &job)?;
        let fit::Candidate { assignment: network, confidence, .. } = &trained[0];
        let agreement = assignment::share_of_agreeing_neighbours(network, &neighbours);
        let score: Vec<f32> = confidence.iter().zip(&agreement).map(|(c, a)| c * a).collect();
        let reliable = reliability::reliable(network, &score, CLUSTERS, 0.5);

        let (all, kmeans) = (accuracy(network, &labels), accuracy(&kmeans, &labels));
        let map = assignment::optimal_map(network, &labels, CLUSTERS)?;
        let inside: Vec<usize> = (0..2000).filter(|&i| reliable[i]).collect();
        let right = inside.iter().filter(|&&i| map[network[i] as usize] == labels[i]).count();
        let inside = right as f64 / inside.len() as f64;
        println!("noise {noise}, seed {seed}: k-means {kmeans}, network {all}, inside {inside}");
        assert!(all >= kmeans - 0.01, "noise {noise}, seed {seed}: {all}, k-means {kmeans}");
        assert!(inside >= all && inside >= 0.99, "noise {noise}, seed {seed}: {inside}, all {all}");
        let least = if noise < 0.3 { 0.99 } else { 0.96 };
        assert!(all >= least && kmeans >= least, "noise {noise}, seed {seed}: {all}, {kmeans}");
    }
    Ok(())
}

/// The whole stage, with the neighbours that it finds.
#[test]
fn networks_do_as_well_as_k_means_and_the_reliable_set_better() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Synthetic { labels, features } = synthetic(2000, 0.3, 0);
    let clusters = cluster(&config(), features, None, &job(folder.path(), 0))?.expect("one rank");

    let (all, kmeans) =
        (accuracy(&clusters.assignment, &labels), accuracy(&clusters.kmeans_assignment, &labels));
    let chosen = |i: &usize| clusters.reliable[*i];
    let pick = |values: &[u32]| -> Vec<u32> {
        (0..values.len()).filter(chosen).map(|i| values[i]).collect()
    };
    let reliable = accuracy(&pick(&clusters.assignment), &pick(&labels));
    println!("k-means {kmeans}, network {all}, reliable {reliable}");
    assert!(kmeans > 0.96, "k-means {kmeans}");
    assert!(all >= kmeans - 0.01, "network {all}, k-means {kmeans}");
    assert!(reliable >= 0.998 && reliable >= all, "reliable {reliable}, all {all}");

    // Everything carries one numbering: prototypes lie at the centres of their own clusters.
    for (k, prototype) in clusters.prototypes.chunks_exact(WIDTH).enumerate() {
        let first = clusters.assignment.iter().position(|&a| a as usize == k).expect("members");
        assert!(prototype[labels[first] as usize] > 0.9, "prototype {k}: {prototype:?}");
    }
    assert_eq!(clusters.stability, None);
    Ok(())
}

#[test]
fn clearly_apart_clusters_are_found_and_keep_their_numbers_over_the_rounds() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Synthetic { labels, features } = synthetic(2000, 0.225, 1);
    let first =
        cluster(&config(), features.clone(), None, &job(folder.path(), 0))?.expect("one rank");
    assert!(accuracy(&first.assignment, &labels) >= 0.99);
    assert!(accuracy(&first.kmeans_assignment, &labels) >= 0.99);

    // The last round under other numbers: this round takes them over, its network too.
    let turn = [2, 0, 3, 1];
    let assignment: Vec<u32> = first.assignment.iter().map(|&k| turn[k as usize]).collect();
    let mut head = first.head.expect("a network");
    head.renumber(&turn);
    let previous = Previous { assignment: assignment.clone(), head: Some(head) };
    let second = cluster(&config(), features.clone(), Some(&previous), &job(folder.path(), 1))?
        .expect("one rank");
    let stability = second.stability.expect("there was a round before");
    assert!(stability > 0.97, "stability {stability}");
    assert!(second.restarted_stability.expect("a network was restarted") > 0.97);
    let equal = second.kmeans_assignment.iter().zip(&assignment).filter(|(a, b)| a == b).count();
    assert!(equal > 1940, "k-means has the same numbers: {equal} of 2000");

    // The network that was kept gives the assignment that was written.
    let mut network = learner(&second.head.expect("a network"), &candle_core::Device::Cpu)?;
    let rows: Vec<f32> = features.backbone.iter().map(|x| x * (WIDTH as f32).sqrt()).collect();
    let rows = candle_core::Tensor::from_vec(rows, (2000, WIDTH), &candle_core::Device::Cpu)?;
    let outputs = network.evaluate(&rows)?.argmax(1)?.to_vec1::<u32>()?;
    assert_eq!(outputs, second.assignment);
    Ok(())
}

#[test]
fn without_networks_k_means_is_the_result() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Synthetic { labels, features } = synthetic(1000, 0.225, 2);
    for kmeans_metric in [KMeansMetric::Spherical, KMeansMetric::Euclidean] {
        let config = Config { heads: 0, kmeans_metric, ..config() };
        let clusters =
            cluster(&config, features.clone(), None, &job(folder.path(), 0))?.expect("one rank");
        assert_eq!(clusters.assignment, clusters.kmeans_assignment);
        assert!(clusters.head.is_none());
        assert!(accuracy(&clusters.assignment, &labels) >= 0.98);
        assert!(clusters.confidence.iter().all(|c| (0.25..=1.0).contains(c)));
        // `predict` computes the same confidence from what the head file holds.
        let width = features.projection.len() / 1000;
        let of_row = |row: &[f32]| -> f64 {
            let logit = |centre: &[f32]| -> f64 {
                let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
                    row.iter().zip(centre).map(|(&x, &c)| f(x.into(), c.into())).sum()
                };
                match clusters.centre_metric {
                    CentreMetric::CosineSoftmax { temperature } => {
                        let lengths = sum(&|x, _| x * x).sqrt() * sum(&|_, c| c * c).sqrt();
                        sum(&|x, c| x * c) / lengths / temperature
                    }
                    CentreMetric::DistanceSoftmax { temperature } => {
                        -sum(&|x, c| (x - c) * (x - c)) / temperature
                    }
                    CentreMetric::Cosine => panic!("a softmax"),
                }
            };
            let logits: Vec<f64> = clusters.centres.chunks(width).map(logit).collect();
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            1. / logits.iter().map(|logit| (logit - largest).exp()).sum::<f64>()
        };
        for (row, &confidence) in features.projection.chunks(width).zip(&clusters.confidence) {
            assert!((of_row(row) - f64::from(confidence)).abs() < 1e-5);
        }
        // A sure assignment is a right one more often.
        let mean = |right: bool| {
            let map = assignment::optimal_map(&clusters.assignment, &labels, 4).expect("four");
            let values: Vec<f32> = (0..1000)
                .filter(|&i| (map[clusters.assignment[i] as usize] == labels[i]) == right)
                .map(|i| clusters.confidence[i])
                .collect();
            values.iter().sum::<f32>() / values.len() as f32
        };
        assert!(mean(true) > mean(false), "{} {}", mean(true), mean(false));
    }
    // Neighbours are not looked for when there are to be none.
    let config = Config { heads: 0, neighbours: 0, ..config() };
    let clusters = cluster(&config, features, None, &job(folder.path(), 0))?.expect("one rank");
    assert_eq!(clusters.score, clusters.confidence);
    Ok(())
}

#[test]
fn a_threshold_takes_the_place_of_the_share() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Synthetic { features, .. } = synthetic(300, 0.3, 2);
    let job = job(folder.path(), 0);
    let threshold =
        Config { heads: 0, reliable_share: None, reliable_confidence: Some(0.95), ..config() };
    Clustering::check(&threshold, &job)?;
    let clusters = cluster(&threshold, features, None, &job)?.expect("one rank");
    let above: Vec<bool> = clusters.confidence.iter().map(|&c| c > 0.95).collect();
    assert!(above.contains(&true) && above.contains(&false));
    assert_eq!(clusters.reliable, above);

    for (share, confidence) in [(None, None), (Some([0.5, 0.9]), Some(0.95)), (None, Some(1.0))] {
        let wrong = Config { reliable_share: share, reliable_confidence: confidence, ..config() };
        let error =
            Clustering::check(&wrong, &job).expect_err("no rule, two, or one that marks nothing");
        assert!(error.to_string().contains("reliable-confidence"), "{error}");
    }
    Ok(())
}

#[test]
fn a_collapse_into_one_cluster_stops_the_stage() {
    let folder = tempfile::tempdir().expect("a folder");
    let Synthetic { features, .. } = synthetic(600, 0.3, 3);
    // Without entropy, agreement is best when all images share one cluster.
    let config = Config { entropy_weight: 0.0, start_epochs: 0, learning_rate: 0.05, ..config() };
    let result = cluster(&config, features, None, &job(folder.path(), 0)).map(|_| ());
    let error = result.expect_err("a collapse");
    assert_eq!(Status::of_error(&error), Status::Diverged, "{error:?}");
}

#[test]
fn fewer_images_than_clusters_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let Synthetic { features, .. } = synthetic(3, 0.3, 3);
    let result = cluster(&config(), features, None, &job(folder.path(), 0)).map(|_| ());
    assert_eq!(Status::of_error(&result.expect_err("too few")), Status::BadInput);
}

/// An images file of so many grey pictures of four pixels.
fn write_images(path: &Path, count: u32) -> Result<DataSet> {
    let source = |i: u32| {
        let picture = Picture::new(2, 2, 1, i.to_le_bytes().to_vec())?;
        Ok((StoredPicture::raw(picture, 1)?, Split::Train))
    };
    images::write(path, 1, (0..count).map(source).collect::<Result<_>>()?)
}

/// The embeddings that the stage reads.
fn embeddings(data_set: DataSet, features: Features) -> Embeddings {
    Embeddings {
        data_set,
        index: (0..features.count as u32).collect(),
        width: WIDTH,
        projection_width: WIDTH,
        views: VIEWS,
        backbone: features.backbone,
        projection: features.projection,
        backbone_views: features.backbone_views,
    }
}

/// A job on 300 pictures, whose embeddings are written where they are missing.
fn stage_job(folder: &Path, out: &str) -> Result<Job> {
    let images = folder.join("images.safetensors");
    if !images.exists() {
        let Synthetic { features, .. } = synthetic(300, 0.3, 4);
        let embeddings = embeddings(write_images(&images, 300)?, features);
        embeddings.write(&folder.join("embeddings.safetensors"))?;
    }
    let data =
        DataTable { clusters: 4, train_on: vec![Split::Train], score_on: vec![Split::Train] };
    let mut job = Job::new("clustering", images, folder.join(out), data);
    job.inputs.insert("embeddings".into(), folder.into());
    std::fs::create_dir_all(&job.out)?;
    Ok(job)
}

/// With three networks, of which four ranks leave one rank without, and with none.
#[test]
fn ranks_write_the_same_bytes_also_after_another_number_was_stopped() -> Result<()> {
    let folder = tempfile::tempdir()?;
    for heads in [3, 0] {
        let config = Config { heads, batch_size: 50, epochs: 2, least_steps: 20, ..config() };
        let job = |out: &str| {
            let mut job =
                stage_job(folder.path(), &format!("{heads} heads, {out}")).expect("a job");
            if out != "previous" {
                let previous = folder.path().join(format!("{heads} heads, previous"));
                job.inputs.insert("previous".into(), previous);
                (job.round, job.rounds) = (1, 1);
            }
            job
        };
        Clustering::run(&config, &job("previous"))?;
        fixture::assert_same_on_ranks::<Clustering>(&config, job);
        let stopped = job("stopped");
        assert_eq!(fixture::stops_on_ranks::<Clustering>(&config, &stopped, 2), heads > 0);
        fixture::run_on_ranks::<Clustering>(&config, &stopped, 4);
        fixture::assert_same_outputs(&job("1 ranks"), &stopped);
    }
    Ok(())
}

#[test]
fn a_loss_that_is_not_finite_ends_all_ranks_alike() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = Config { learning_rate: 1e38, ..config() };
    let job = stage_job(folder.path(), "out")?;
    let errors: Vec<String> = fixture::results_on_ranks::<Clustering>(&config, 4, |_| &job)
        .into_iter()
        .map(|result| {
            let error = result.expect_err("not finite");
            assert_eq!(Status::of_error(&error), Status::Diverged, "{error:?}");
            error.to_string()
        })
        .collect();
    assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
    Ok(())
}

/// The stage with any number of threads: the same bytes.
#[test]
fn the_number_of_threads_changes_no_bit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    // More than 64 images, hidden units and rows, so that products are split between threads.
    let Synthetic { features, .. } = synthetic(1500, 0.3, 4);
    std::fs::create_dir(at("embeddings"))?;
    let data_set = write_images(&at("images.safetensors"), 1500)?;
    let embeddings = embeddings(data_set, features);
    embeddings.write(&at("embeddings").join("embeddings.safetensors"))?;
    let config = Config { epochs: 2, least_steps: 20, ..config() };

    let start = |threads: &str, round: usize, previous: Option<&str>| -> Result<()> {
        let data =
            DataTable { clusters: 4, train_on: vec![Split::Train], score_on: vec![Split::Train] };
        let out = at(&format!("{threads}-{round}"));
        let mut job = Job::new("clustering", at("images.safetensors"), out, data);
        (job.round, job.rounds) = (round, 1);
        job.inputs.insert("embeddings".into(), at("embeddings"));
        if let Some(previous) = previous {
            job.inputs.insert("previous".into(), at(previous));
        }
        if at("refined").exists() {
            job.inputs.insert("refined-head".into(), at("refined"));
        }
        std::fs::create_dir_all(&job.out)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.parse()?).build()?;
        pool.install(|| Clustering::run(&config, &job))
    };
    let run = |threads: &str, round: usize, previous: Option<&str>| -> Result<Vec<Vec<u8>>> {
        start(threads, round, previous)?;
        let out = format!("{threads}-{round}");
        Ok(vec![
            std::fs::read(at(&out).join("pseudo-labels.safetensors"))?,
            std::fs::read(at(&out).join("head.safetensors"))?,
        ])
    };
    let one = run("1", 0, None)?;
    for threads in ["2", "3", "8"] {
        assert!(run(threads, 0, None)? == one, "{threads} threads give other bytes than 1");
    }

    // The next round reads what this one wrote.
    let next = run("2", 1, Some("1-0"))?;
    assert!(next != one);
    let labels = PseudoLabels::open(&at("2-1").join("pseudo-labels.safetensors"))?;
    assert!(labels.stability.expect("there was a round before") > 0.5);

    // Both networks put most images into one cluster, and one of them was kept.
    let agreement = labels.head_agreement.expect("networks were trained");
    assert!(agreement.iter().all(|share| [0.5, 1.].contains(share)));
    assert!(agreement.iter().filter(|share| **share == 1.).count() > 750);

    // A refined network takes the place of the last round's.
    std::fs::create_dir(at("refined"))?;
    std::fs::copy(at("1-0").join("head.safetensors"), at("refined").join("head.safetensors"))?;
    assert!(run("2", 1, Some("1-0"))? == next, "it is the last round's");
    let shape = HeadShape { width: WIDTH, hidden: 64, clusters: CLUSTERS };
    Head::random(shape, 9, &[]).write(&at("refined"))?;
    assert!(run("2", 1, Some("1-0"))? != next, "it is another one");
    std::fs::remove_dir_all(at("refined"))?;

    // Embeddings of other images, and of some of them alone, are refused.
    let other = DataSet { fingerprint: "another".into(), ..embeddings.data_set.clone() };
    let mut fewer = embeddings.clone();
    fewer.index.pop();
    fewer.backbone = fewer.backbone[..1499 * WIDTH].to_vec().into();
    fewer.projection = fewer.projection[..1499 * WIDTH].to_vec().into();
    (fewer.views, fewer.backbone_views) = (0, vec![].into());
    for (spoilt, says) in [
        (Embeddings { data_set: other, ..embeddings.clone() }, "other images"),
        (fewer, "1499 embeddings but 1500"),
    ] {
        spoilt.write(&at("embeddings").join("embeddings.safetensors"))?;
        let error = start("4", 0, None).expect_err("spoilt");
        assert_eq!(Status::of_error(&error), Status::BadInput, "{error:#}");
        let error = format!("{error:#}");
        assert!(error.contains("embeddings.safetensors") && error.contains(says), "{error}");
    }
    Ok(())
}
