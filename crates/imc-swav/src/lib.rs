//! Stage: IMC-SwAV, clustering by swapped prediction and information, in one phase.
//!
//! Every picture gives two large and four small crops. Encoder, projector and prototypes learn to
//! predict from each crop the codes of the large ones: soft assignments to a thousand prototypes, made
//! by Sinkhorn's algorithm so that all prototypes are used (SwAV, Caron et al. 2020,
//! arXiv:2006.09882). At the same time a classifier with one output for each cluster maximises mutual
//! information with the prototypes while it keeps the clusters balanced; it sees the encoder's
//! output as a constant. The cluster of a picture is the classifier's largest output. There is no
//! k-means, no second stage and no target network (IMC-SwAV, Ntelemis, Jin, Thomas 2022,
//! arXiv:2103.07368).
//!
//! - Reads `images.safetensors`, and from the optional role `backbone` a `backbone.safetensors` to
//!   start from.
//! - Writes `network.safetensors` (encoder, projector, classifier, prototypes),
//!   `backbone.safetensors`, `config.json`, `state.safetensors`, `head.safetensors` (the classifier),
//!   `log.jsonl`, and the result twice: `pseudo-labels.safetensors` with the batch-norm statistics
//!   that `evaluation` names, `pseudo-labels-<name>.safetensors` with the other ones. Network and
//!   head have the statistics of training. The k-means of the pseudo-labels is on the embeddings,
//!   their prototypes are the mean projections of the clusters.
//!
//! Start at the `run` of [`ImcSwav`]; the losses are in [`loss`], the values of an experiment in
//! [`Config`].

pub mod bank;
mod config;
mod evaluation;
pub mod loss;
pub mod network;

use std::collections::BTreeSet;

use anyhow::Result;
use candle_core::Tensor;
use data::{Images, PseudoLabels};
use layers::BatchGroups;
use stage::{Effort, Job, Output, Ranks, Role, Spec, Stage};
use training::{Run, backward, sampler, tensors};

pub use config::{ClassifierWidths, Config, Crops, Evaluation, ProjectorWidths};
pub use evaluation::predict;

use crate::bank::Bank;
use crate::loss::{codes, information_loss, logit_penalty, swapped_prediction_loss};
use crate::network::ImcSwavNetworks;

/// The stage: see the documentation of the crate.
pub struct ImcSwav;

impl Stage for ImcSwav {
    const SPEC: Spec = Spec {
        name: "imc-swav",
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
        let classified: BTreeSet<u32> = images.rows(&config.classify_on).into_iter().collect();
        let plan = config.plan(rows.len());

        let learning_rate = config.learning_rate(plan.steps_per_epoch);

        let start = job.optional_input("backbone");
        let (clusters, seed) = (job.data.clusters, job.seed);
        let networks = ImcSwavNetworks::random(config, clusters, seed, start, &device)?;
        let mut networks = networks.in_groups(&groups)?;
        let mut run = Run::resume_or_start(job, config, images.fingerprint(), plan, &mut networks)?;
        let views = config.views(&images, job.seed).in_groups(&groups);

        while let Some(epoch) = run.next_epoch() {
            if run.batches_done() == 0 {
                networks.bank = Bank::new(&device);
            }
            let order = sampler::uniform(&rows, config.run.batch_size, job.seed, epoch)?;
            for batch in views.epoch(epoch, order, run.batches_done())? {
                let batch = batch?;
                let takes_part = places(&batch.rows, &classified);
                networks.normalise_prototypes()?;
                let (mut crops, mut scores) = (Vec::new(), Vec::new());
                for pictures in tensors(batch, &device)? {
                    let seams = networks.forward(&pictures)?; // Each crop has its own statistics.
                    scores.push(networks.scores(&seams[1])?);
                    crops.push(seams);
                }
                run.note_projections(&crops[0][1])?; // An error when they have collapsed.

                // Encoder, projector, prototypes: every crop predicts the codes of the other large ones.
                let codes = scores[..config.large.count]
                    .iter()
                    .map(|scores| codes(scores, config.code_epsilon, config.code_rounds))
                    .collect::<Result<Vec<_>>>()?;
                let swapped = swapped_prediction_loss(&scores, &codes, config.temperature)?;

                // The classifier learns from the prototypes' scores once a batch is gathered.
                let embeddings: Vec<Tensor> = crops.iter().map(|[e, _]| e.detach()).collect();
                networks.bank.add(&embeddings, &scores, &takes_part)?;
                let gathered = networks.bank.take(plan.batch_size);
                let total = match &gathered {
                    Some(gathered) => {
                        (&swapped.detach() + classify(config, &mut networks, gathered, &mut run)?)?
                    }
                    None => swapped.detach(),
                };
                run.note_scalar("swapped-prediction-loss", &swapped)?;
                run.note_loss(&total)?; // An error when it is not finite.

                let gradients = swapped.backward()?;
                networks.expect_passes(crops.len())?; // Ranks sum the gradients during the last one.
                networks.backward(crops, &gradients)?; // Adds to the gradients, crop by crop.
                run.check_gradients(&device, || networks.first_gradient_not_finite(&gradients))?;
                let adam = config.adam(learning_rate.at(run.step()));
                let moves_prototypes = run.step() > config.schedule.warmup_steps;
                networks.step(&gradients, adam, moves_prototypes, gathered.is_some())?;
                run.end_step(&mut networks)?; // Saves when the program is asked to stop.
            }
            run.end_epoch(&mut networks)?; // Writes a log line, and a checkpoint when due.
        }
        run.finish(&mut networks, &config.configuration()?)?;
        if !job.communicator.is_first() {
            return Ok(()); // The first rank finds and writes the result.
        }
        let job = &job.alone();
        let mut networks = networks.in_groups(&BatchGroups::one())?;
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

/// The classifier's loss on gathered images, whose gradients are added to the classifier's:
/// information over all ordered pairs of crops, and the limit on its logits.
fn classify(
    config: &Config,
    networks: &mut ImcSwavNetworks,
    gathered: &Bank,
    run: &mut Run,
) -> Result<Tensor> {
    let classifier = &mut networks.classifier;
    let mut seams = Vec::new();
    for embedding in &gathered.embeddings {
        seams.push(classifier.forward_batch(embedding)?);
    }
    let logits: Vec<Tensor> = seams.iter().map(|seam| (**seam).clone()).collect();
    let (temperature, weight) = (config.temperature, config.entropy_weight);
    let information = information_loss(&logits, &gathered.scores, temperature, weight)?;
    let penalty = logit_penalty(&logits, config.logit_limit, config.logit_penalty)?;
    run.note_scalar("conditional-entropy", &information.conditional_entropy)?;
    run.note_scalar("entropy", &information.entropy)?;
    run.note_scalar("logit-penalty", &penalty)?;
    let loss = (information.loss + penalty)?;
    let gradients = loss.backward()?;
    classifier.expect_passes(seams.len())?;
    for seam in seams {
        backward([&mut *classifier], [seam], &gradients)?; // No gradient reaches the encoder.
    }
    Ok(loss.detach())
}

/// Indices in the batch of those rows that take part.
fn places(rows: &[u32], taking_part: &BTreeSet<u32>) -> Vec<u32> {
    let of_batch = rows.iter().zip(0..);
    of_batch.filter(|(row, _)| taking_part.contains(row)).map(|(_, place)| place).collect()
}

#[cfg(test)]
mod tests;
