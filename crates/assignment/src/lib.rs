//! Algorithms on embeddings: k-means, nearest neighbours, matching of clusterings, Sinkhorn-Knopp.
//!
//! Every round of every method groups embeddings ([`k_means`]), looks for what lies close
//! ([`nearest_neighbours`]) and compares two groupings whose numbers mean nothing
//! ([`optimal_map`]). This crate is those algorithms and nothing else: it reads no file and knows
//! no picture, no network and no label.
//!
//! Points are rows of a flat `f32` slice, `(N, D)` row-major. Sums are taken in `f64`, split by
//! shape and added in a fixed order, so results are the same bits for any number of threads.
//! Bad input is an error that names the row; nothing is silently repaired.
//!
//! # How fast
//!
//! `cargo xtask bench assignment --peer-python PATH` times it beside other libraries. Measured at
//! `2488de8` on two cores with AVX-512 (VNNI, no AMX) that did other work too, ours and peers in
//! turn, one round, so that the figures are rough; times as fast as the fastest of faiss 1.15.1,
//! scikit-learn 1.9.1 and torch 2.15.0, by the clock and by processor time:
//!
//! | work | fastest peer | by the clock | by processor |
//! |---|---|---|---|
//! | k-means from given centres, 200,000 × 512, K 1,000, 20 iterations | scikit-learn | 7.2 | 7.3 |
//! | k-means, 50,000 × 256, K 10, 10 restarts to convergence | scikit-learn | 17.5 | 19.7 |
//! | exact 20 neighbours, 50,000 × 512 | torch in bf16, which is not exact | 2.9 | 2.1 |
//! | the same | faiss | 6.3 | 5.8 |
//! | ACC, NMI and ARI of 1,000,000 labels, K 10 (crate `metrics`) | scikit-learn | 146 | 27 |
//! | ACC, NMI and ARI of 1,000,000 labels, K 1,000 | scikit-learn | 19 | 25 |
//!
//! Inertias agreed to 10⁻⁴ of the peers', neighbours (sum of indices) with faiss, scores to 10⁻⁶. In
//! the first row ours made one assignment less of 21 than faiss; the bench has been corrected since.
//! Processor time has a resolution of 0.01 s, which the last two rows do not outlast by much.

mod approximate;
mod argmax;
mod iterations;
mod k_means;
mod lloyd;
mod matching;
mod neighbours;
mod points;
mod prototypes;
mod sample;
mod seeding;
mod shares;
mod sinkhorn;
mod streaming;

pub use approximate::{Approximate, approximate_neighbours};
pub use argmax::argmax_rows;
pub use k_means::{
    Clustering, KMeans, Metric, k_means, k_means_from, k_means_weighted, k_means_weighted_from,
};
pub use matching::{Contingency, contingency, optimal_map};
pub use neighbours::{nearest_neighbours, nearest_neighbours_and_self};
pub use prototypes::prototypes;
pub use sample::sample;
pub use shares::{Shares, shares};
pub use sinkhorn::sinkhorn;
pub use streaming::{Shards, Streaming, k_means_mini_batch, k_means_streaming};
