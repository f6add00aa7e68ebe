//! Bytes that each rank sends in a step of BYOL, and their time against that of the computation.
//!
//! `cargo run --package backbone --example traffic -- 34 64 256 12.5 1.0`: depth and width of the ResNet,
//! images of a batch, the link of a rank in GB/s, and seconds of a step on one rank, measured.

use std::env;

use anyhow::{Context, Result, ensure};
use backbone::Configuration;
use layers::{EntryKind, Network};
use serde_json::json;

/// From one end of a link to the other, for a small message, in seconds: InfiniBand or 100 Gb Ethernet.
const LATENCY: f64 = 5e-6;

fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    ensure!(
        words.len() == 5,
        "give depth, width, images of a batch, GB/s of a link, seconds of a step"
    );
    let number = |at: usize| words[at].parse::<f64>().with_context(|| words[at].clone());
    let [width, batch, gigabytes, seconds] = [number(1)?, number(2)?, number(3)?, number(4)?];
    let configuration: Configuration = serde_json::from_value(json!({
        "backbone": { "depth": words[0], "width": width as usize, "stem": "3x3" },
        "projector": { "hidden": 4096, "width": 256 },
        "predictor": { "hidden": 4096 },
        "channels": 3,
        "input": {},
    }))?;
    let (backbone, projector) = (configuration.backbone_plan()?, configuration.projector_plan()?);
    let predictor = configuration.predictor_plan()?;
    let (online, target) = ([&backbone, &projector, &predictor], [&backbone, &projector]);
    let parameters: f64 = online.iter().map(|plan| numbers(plan, |_| true)).sum();
    // Two views forward through both networks, and back through one of them.
    let norms = 2. * (2. * joins(&online) + joins(&target));
    let channels = 2. * (2. * channels(&online) + channels(&target));
    let blocks: usize = online.iter().map(|plan| plan.blocks().len()).sum();
    let outputs = |plans: &[&Network]| plans.iter().map(|plan| plan.output_width()).sum::<usize>();
    let gathered = 2. * batch * (outputs(&online) + projector.output_width()) as f64;

    println!("ranks  gradients  norms  outputs  MB in all  ms  of a step  at best");
    for ranks in [2, 4, 8, 16, 32, 64].map(f64::from) {
        let (share, levels) = ((ranks - 1.) / ranks, ranks.log2());
        let megabytes = [
            2. * share * 4. * parameters / 1e6,
            levels * 8. * (2. * channels + norms) / 1e6,
            share * 4. * gathered / 1e6,
        ];
        let all: f64 = megabytes.iter().sum();
        let messages = levels * (norms + 2. * blocks as f64 + 2. * 4.);
        let time = all / 1e3 / gigabytes + messages * LATENCY;
        let [gradients, norms, outputs] = megabytes;
        // The gradients travel during the last backward pass, a quarter of the computation; at best, none wait for
        // its end.
        let computation = seconds / ranks;
        let beside = (gradients / 1e3 / gigabytes).min(computation / 4.);
        let share = |waiting: f64| 100. * waiting / (waiting + computation);
        println!(
            "{ranks:5}  {gradients:9.1}  {norms:5.1}  {outputs:7.1}  {all:9.1}  {:.1}  {:.0} %  {:.0} %",
            1e3 * time,
            share(time),
            share(time - beside)
        );
    }
    Ok(())
}

/// Numbers in the entries of a kind.
fn numbers(plan: &Network, of: impl Fn(EntryKind) -> bool) -> f64 {
    let parameters = plan.parameters();
    let entries = parameters.entries().iter().filter(|entry| of(entry.kind));
    entries.map(|entry| entry.range.len()).sum::<usize>() as f64
}

/// Channels of all batch norms.
fn channels(plans: &[&Network]) -> f64 {
    plans.iter().map(|plan| numbers(plan, |kind| kind == EntryKind::NormWeight)).sum()
}

/// Batch norms.
fn joins(plans: &[&Network]) -> f64 {
    let of = |plan: &&Network| {
        let parameters = plan.parameters();
        parameters.entries().iter().filter(|entry| entry.kind == EntryKind::NormWeight).count()
    };
    plans.iter().map(of).sum::<usize>() as f64
}
