//! Stage: IMC-SwAV, clustering by swapped prediction and information, in one phase.
//!
//! Of every picture two large and four small crops are taken. Encoder, projector and prototypes
//! learn to predict from each crop how the large ones lie among a thousand prototypes: the codes,
//! made by Sinkhorn's algorithm so that all prototypes are used (SwAV, Caron et al. 2020,
//! arXiv:2006.09882). Beside them a classifier with one output for each cluster learns to know as
//! much as it can of the prototypes, with clusters of one size; it sees the encoder's output as a
//! constant. Its largest output is the cluster; there is no k-means, no second stage and no target
//! network (IMC-SwAV, Ntelemis, Jin, Thomas 2022, arXiv:2103.07368).
//!
//! Reads `images.safetensors`, and from the optional role `backbone` a `backbone.safetensors` to
//! start from. Writes `network.safetensors` (encoder, projector, classifier, prototypes),
//! `backbone.safetensors`, `config.json`, `state.safetensors`, `head.safetensors` (the classifier),
//! `log.jsonl`, and twice the result:
//! `pseudo-labels.safetensors`, predicted with the batch-norm statistics that `evaluation` names,
//! and `pseudo-labels-<name>.safetensors` with the other ones. `network.safetensors` and
//! `head.safetensors` have the statistics of training. The pseudo-labels' k-means is on the embeddings, their prototypes are
//! the mean projections of the clusters.
//!
//! The losses are in [`loss`]; the order of a step is [`run`]; what varies, [`Config`].

pub mod bank;
mod config;
mod evaluation;
pub mod loss;
pub mod network;

use std::collections::BTreeSet;

use anyhow::{Context, Result};
use backbone::backbone_file;
use candle_core::{Device, Tensor};
use data::{Batch, Images, PseudoLabels};
use stage::{Effort, Job, Output, Role, Spec, Stage};
use training::{Run, Seam, sampler};

pub use config::{ClassifierWidths, Config, Crops, Evaluation, ProjectorWidths};
pub use evaluation::predict;

use crate::bank::Bank;
use crate::loss::{codes, entropies, logit_penalty, swapped_prediction_loss};
use crate::network::{Crop, Networks};

/// The stage: see the documentation of the crate.
pub struct ImcSwav;

impl Stage for ImcSwav {
    const SPEC: Spec = Spec {
        name: "imc-swav",
        algorithm: 2,
        inputs: &[Role::BACKBONE],
        outputs: &[Output::Network, Output::PseudoLabels],
    };
    type Config = Config;

    fn check(config: &Config, job: &Job) -> Result<Effort> {
        config.check(job)
    }

    /// Files in, files out; goes on where an interrupted run stopped.
    ///
    /// # Errors
    ///
    /// An input is missing, damaged or foreign; the run was interrupted, diverged or collapsed.
    fn run(config: &Config, job: &Job) -> Result<()> {
        let images = Images::of_job(job)?;
        let device = training::network_device(job.device)?;
        let rows = images.rows(&job.data.train_on);
        let classified: BTreeSet<u32> = images.rows(&config.classify_on).into_iter().collect();
        let plan = config.plan(rows.len());

        let start = job.optional_input("backbone").map(|folder| folder.join(backbone_file::NAME));
        let (clusters, seed) = (job.data.clusters, job.seed);
        let mut networks = Networks::random(config, clusters, seed, start.as_deref(), &device)?;
        let mut run = Run::resume_or_start(job, config, images.fingerprint(), plan, &mut networks)?;
        let widths = [config.backbone.embedding_width(), config.prototypes];
        let mut bank = Bank::kept(&run, config.crops(), widths, &device)?;

        while let Some(epoch) = run.next_epoch() {
            if run.batches_done() == 0 {
                bank = Bank::default();
            }
            let order = sampler::uniform(&rows, config.batch_size, job.seed, epoch)?;
            for batch in config.loader(&images, order, run.batches_done(), job.seed, epoch)? {
                let batch = batch?;
                let update = run.step() - 1;
                let takes_part = places(&batch.rows, &classified);
                networks.normalise_prototypes()?;
                let mut crops = Vec::with_capacity(config.crops());
                for pictures in tensors(batch, &device)? {
                    crops.push(networks.forward(&pictures)?); // One forward a crop: statistics of its own.
                }
                run.note_projections(&crops[0].projection())?; // An error when they have collapsed.

                // Encoder, projector, prototypes: every crop predicts the codes of the other large ones.
                let scores: Vec<Tensor> = crops.iter().map(|crop| crop.scores.clone()).collect();
                let codes = scores[..config.large.count]
                    .iter()
                    .map(|scores| codes(scores, config.code_epsilon, config.code_rounds))
                    .collect::<Result<Vec<_>>>()?;
                let swapped = swapped_prediction_loss(&scores, &codes, config.temperature)?;

                // The classifier: what its clusters know of the prototypes, once a batch is gathered.
                let embeddings: Vec<Tensor> = crops.iter().map(Crop::embedding).collect();
                bank.add(&embeddings, &scores, &takes_part)?;
                let gathered = bank.take(plan.batch_size);
                let total = match &gathered {
                    Some(gathered) => {
                        (&swapped.detach() + classify(config, &mut networks, gathered, &mut run)?)?
                    }
                    None => swapped.detach(),
                };
                run.note_scalar("swapped-prediction-loss", &swapped)?;
                run.note_loss(&total)?; // An error when it is not finite.

                let gradients = swapped.backward()?;
                networks.backward(crops, &gradients)?; // Adds to the gradients, crop by crop.
                run.refuse_gradient(networks.first_gradient_not_finite()?)?;
                let adam = config.adam(config.rate(update, epoch));
                let moves = config.moves_prototypes(update);
                networks.step(&gradients, adam, moves, gathered.is_some())?;
                bank.keep(&mut run)?;
                run.end_step(&networks)?; // A checkpoint when the program is asked to stop.
            }
            run.end_epoch(&networks)?; // One line in the log; a checkpoint when due.
        }
        run.finish(&networks, &config.configuration()?)?;
        networks.write_head(&job.out, job.data.clusters)?;

        // Running statistics first: refreshing changes them.
        for evaluation in Evaluation::ALL {
            if evaluation == Evaluation::RefreshedStatistics && config.refresh_batches == 0 {
                continue;
            }
            let found = predict(config, &images, &mut networks, evaluation, job, &device)?;
            let name = match evaluation == config.evaluation {
                true => PseudoLabels::FILE.to_owned(),
                false => format!("pseudo-labels-{}.safetensors", evaluation.name()),
            };
            PseudoLabels::of_one_phase(job, &images, found)?.write(&job.out.join(name))?;
        }
        Ok(())
    }
}

/// The classifier's loss on gathered images, whose gradients are added to the classifier's own:
/// information over all ordered pairs of crops, and the limit on its logits.
fn classify(
    config: &Config,
    networks: &mut Networks,
    gathered: &Bank,
    run: &mut Run,
) -> Result<Tensor> {
    let classifier = &mut networks.classifier;
    let learn = |embedding| classifier.learn(embedding);
    let seams =
        gathered.embeddings.iter().map(learn).collect::<candle_core::Result<Vec<Seam>>>()?;
    let logits: Vec<Tensor> = seams.iter().map(|seam| seam.output.as_tensor().clone()).collect();
    let (conditional, entropy) = entropies(&logits, &gathered.scores, config.temperature)?;
    let information = (&conditional - (&entropy * config.entropy_weight)?)?;
    let penalty = logit_penalty(&logits, config.logit_limit, config.logit_penalty)?;
    run.note_scalar("conditional-entropy", &conditional)?;
    run.note_scalar("entropy", &entropy)?;
    run.note_scalar("logit-penalty", &penalty)?;
    let loss = (information + penalty)?;
    let gradients = loss.backward()?;
    for seam in seams {
        let at_logits = gradients.get(&seam.output).context("a gradient at the logits")?;
        classifier.backward(seam, at_logits, false)?; // Nothing goes on to the encoder.
    }
    Ok(loss.detach())
}

/// Places in the batch of those rows that take part.
fn places(rows: &[u32], taking_part: &BTreeSet<u32>) -> Vec<u32> {
    let of_batch = rows.iter().zip(0..);
    of_batch.filter(|(row, _)| taking_part.contains(row)).map(|(_, place)| place).collect()
}

/// The crops of a batch, `(B, H, W, C)` each.
fn tensors(mut batch: Batch, device: &Device) -> Result<Vec<Tensor>> {
    let views = std::mem::take(&mut batch.views);
    let tensor = |(view, values)| Ok(Tensor::from_vec(values, batch.shape_of(view), device)?);
    views.into_iter().enumerate().map(tensor).collect()
}

#[cfg(test)]
mod tests;
