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

mod approximate;
mod iterations;
mod k_means;
mod lloyd;
mod matching;
mod neighbours;
mod points;
mod prototypes;
mod sample;
mod seeding;
mod sinkhorn;
mod streaming;

pub use approximate::{Approximate, approximate_neighbours};
pub use k_means::{
    Clustering, KMeans, Metric, k_means, k_means_from, k_means_weighted, k_means_weighted_from,
};
pub use matching::{Contingency, contingency, optimal_map};
pub use neighbours::{nearest_neighbours, nearest_neighbours_and_self};
pub use prototypes::prototypes;
pub use sample::sample;
pub use sinkhorn::sinkhorn;
pub use streaming::{Shards, Streaming, k_means_mini_batch, k_means_streaming};
