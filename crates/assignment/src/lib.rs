//! Algorithms on embeddings: k-means, nearest neighbours, maps, Sinkhorn-Knopp, Hungarian matching.
//!
//! Every round of every method groups embeddings ([`k_means`]), searches for neighbours
//! ([`nearest_neighbours`]) and compares two groupings whose cluster numbers are arbitrary
//! ([`optimal_map`]). [`consensus`] makes one grouping of several, [`number`] guesses how many clusters
//! there are, [`TSne`] draws points on a map. This crate holds these algorithms and nothing else: it reads
//! no file and knows no picture, no network and no label.
//!
//! Points are rows of a flat `f32` slice, `(N, D)` row-major. Sums are accumulated in `f64`, split
//! by shape and added in a fixed order, so results are bit-identical for any number of threads.
//! Invalid input is an error that names the row; nothing is repaired silently.
//!
//! ```
//! use assignment::{KMeans, Metric, k_means, optimal_map, shares};
//!
//! // Two groups of directions; lengths do not matter.
//! let points = [1.0, 0.1, 2.0, -0.1, -0.1, 1.0, 0.2, 3.0];
//! let config = KMeans {
//!     clusters: 2,
//!     metric: Metric::Spherical,
//!     restarts: 4,
//!     iterations: 300,
//!     tolerance: 1e-4,
//! };
//! let found = k_means(&points, 4, 2, &config, 0)?;
//!
//! // Cluster numbers are arbitrary: renumber them to match another grouping.
//! let map = optimal_map(&found.assignment, &[0, 0, 1, 1], 2)?;
//! let renumbered: Vec<u32> = found.assignment.iter().map(|&k| map[k as usize]).collect();
//! assert_eq!(renumbered, [0, 0, 1, 1]);
//! assert_eq!(shares(&found.assignment, 2)?.smallest, 1.0);
//! # anyhow::Ok(())
//! ```
//!
//! How fast these are beside faiss, scikit-learn and torch: `crates/assignment/README.md`.

mod approximate;
mod argmax;
mod clustering;
mod consensus;
mod iterations;
mod k_means;
mod lloyd;
mod logistic;
mod map;
mod matching;
mod neighbours;
pub mod number;
mod points;
mod prototypes;
mod rand_index;
mod sample;
mod seeding;
mod shares;
mod silhouette;
mod sinkhorn;
mod spectral;
mod streaming;

pub use approximate::{Approximate, approximate_neighbours};
pub use argmax::argmax_rows;
pub use clustering::{Clustering, KMeans, Metric};
pub use consensus::{Consensus, agreement, consensus, merged_clusters};
pub use k_means::{
    k_means, k_means_from, k_means_on_ranks, k_means_weighted, k_means_weighted_from,
};
pub use logistic::Generalisation;
pub use map::{TSne, principal_plane, trustworthiness};
pub use matching::{Contingency, contingency, optimal_map};
pub use neighbours::{
    chance_corrected_agreement, nearest_neighbours, nearest_neighbours_on_ranks,
    share_of_agreeing_neighbours,
};
pub use prototypes::prototypes;
pub use rand_index::adjusted_rand_index;
pub use sample::sample;
pub use shares::{Shares, shares};
pub use silhouette::Distances;
pub use sinkhorn::sinkhorn;
pub use spectral::neighbour_graph_eigenvalues;
pub use streaming::{Shards, Streaming, k_means_mini_batch, k_means_streaming};

#[cfg(test)]
mod tests {
    use anyhow::Result;
    use collective::Communicator;

    /// What `run` returns on each of so many ranks, which are threads.
    pub(crate) fn on_ranks<T: Send>(
        count: usize,
        run: impl Fn(Communicator) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        let ranks = Communicator::threads(count)?;
        std::thread::scope(|scope| {
            let run = &run;
            let threads: Vec<_> =
                ranks.into_iter().map(|rank| scope.spawn(move || run(rank))).collect();
            threads.into_iter().map(|rank| rank.join().expect("no panic")).collect()
        })
    }
}
