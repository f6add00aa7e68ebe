//! Disk, memory and hours of each stage on a large data set, as the stages are built today.
//!
//! `cargo run --package collective --example scale -- 100 20 512 256 1900 50 16000 64`: millions of pictures, KB of a
//! stored picture, widths of embeddings and projections, pictures a second through a training on all
//! ranks, its epochs, pictures a second through a network on all ranks, GB of memory of a machine.

use std::env;
use std::process::ExitCode;

/// Bytes that each process keeps of a picture: digest, size, offset, split, encoding, whether it was checked, and a
/// slot for the decoded picture.
const LISTED: f64 = 67.;
/// Augmented copies whose embeddings `embed` stores beside the picture's own, see `configs/stage/embed.toml`.
const VIEWS: f64 = 8.;
/// What the search for 20 neighbours holds of a picture: 128 candidates of 8 bytes, 32 exact ones of 16, 20 results of 4.
const SEARCH: f64 = 1616.;

fn main() -> ExitCode {
    let numbers: Option<Vec<f64>> = env::args().skip(1).map(|word| word.parse().ok()).collect();
    let Some([millions, kilobytes, width, projection, training_rate, epochs, embed_rate, memory]) =
        numbers.as_deref().and_then(|numbers| numbers.first_chunk()).copied()
    else {
        eprintln!(
            "give millions of pictures, KB of each, widths of embeddings and projections, pictures a second of \
             training, epochs, pictures a second of embed, GB of memory"
        );
        return ExitCode::FAILURE;
    };
    let pictures = millions * 1e6;
    let embedded = 4. * (width * (1. + VIEWS) + projection);
    // Of each picture: bytes on disk, bytes in the memory of a process, seconds.
    let stages = [
        ("prepare", 1e3 * kilobytes, LISTED, None),
        // The rows, and their order in an epoch.
        ("pretraining", 0., LISTED + 8., Some(epochs / training_rate)),
        // The rows, and their division into batches.
        ("embed", embedded, LISTED + 8., Some((1. + VIEWS) / embed_rate)),
        // Most is held by the search: the projections at unit length, and packed; embeddings stay in their file. With
        // 1,000 clusters or more, the memberships by a network exceed it. It writes pseudo-labels.
        ("clustering", 25., LISTED + 8. * projection + SEARCH, None),
    ];
    println!("stage        GB on disk  GB of memory  hours  millions in {memory} GB");
    for (stage, disk, held, seconds) in stages {
        let hours =
            seconds.map_or_else(String::new, |of_one| format!("{:.0}", of_one * pictures / 3600.));
        println!(
            "{stage:11}  {:10.0}  {:12.0}  {hours:>5}  {:.1}",
            disk * pictures / 1e9,
            held * pictures / 1e9,
            1e3 * memory / held
        );
    }
    ExitCode::SUCCESS
}
