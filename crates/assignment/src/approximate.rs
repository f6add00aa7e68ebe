//! Approximate nearest neighbours, for more rows than [`nearest_neighbours`] can compare in pairs.
//!
//! Exact search takes time proportional to `N²`. A graph (HNSW; Malkov and Yashunin 2016,
//! arXiv:1603.09320; the crate `instant-distance`) takes about `N ln N`, but far more per row.
//! Measured on two busy cores: a graph of 20,000 rows of width 256 in separate groups, with its
//! search for 20 neighbours of each, took about four times as long as exact search of 50,000 rows of
//! width 512, which is 12 times the work. Extrapolated, they break even at about a million rows
//! (not measured there), and later with more noise. Recall was 1.00 there. With noise three times
//! as long as the group's direction, recall was 0.93, 0.94 and 0.98 for a search breadth of 50, 100
//! and 200. So no stage uses this.
//!
//! Rows are split into pieces of a fixed size, and one thread builds the graph of each piece, so
//! the result is the same for any number of threads. Every graph is searched for each row.
//!
//! [`nearest_neighbours`]: crate::nearest_neighbours

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use instant_distance::{Builder, Hnsw, Point, Search};
use kernels::similarity::{product, squared_distance};
use rayon::prelude::*;

use crate::points;

/// The parameters of an approximate search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Approximate {
    /// Most rows in one graph. Smaller pieces are built in parallel, but all of them are searched.
    pub piece: usize,
    /// Candidates kept while building and searching (`ef`), at least `k + 1`. Recall and time grow
    /// with it.
    pub breadth: usize,
}

/// Finds most of the `k` nearest other rows of each row of `points` `(N, D)`, of unit length.
///
/// Like [`nearest_neighbours`](crate::nearest_neighbours), but some of the nearest may be missing.
/// The found ones are ordered by their exact inner product. Returns `(N, k)` indices, nearest first.
///
/// # Errors
///
/// Those of [`nearest_neighbours`](crate::nearest_neighbours); a row is not of unit length (the
/// message names it), or a value of `config` is out of range.
pub fn approximate_neighbours(
    points: &[f32],
    n: usize,
    d: usize,
    k: usize,
    config: &Approximate,
    seed: u64,
) -> Result<Vec<u32>> {
    const NAME: &str = "approximate_neighbours";
    points::check(points, n, d, NAME)?;
    ensure!(
        k < n.max(1) && u32::try_from(n).is_ok(),
        "{NAME}: {k} neighbours of each of {n} points; at most {} exist",
        n.saturating_sub(1)
    );
    let Approximate { piece, breadth } = *config;
    ensure!(piece > 0, "{NAME}: piece is 0; 100,000 rows are usual");
    ensure!(
        breadth > k,
        "{NAME}: breadth {breadth} does not hold {k} neighbours and the row itself"
    );
    let is_unit = |row: &[f32]| (product(row, row) - 1.).abs() < 1e-3;
    if let Some(row) = points.par_chunks(d).position_first(|row| !is_unit(row)) {
        anyhow::bail!("{NAME}: row {row} is not of unit length; scale the rows first");
    }
    if k == 0 {
        return Ok(vec![]);
    }
    let graphs = build(points, d, piece, breadth, seed)?;
    let mut neighbours = vec![0u32; n * k];
    neighbours.par_chunks_mut(k).enumerate().for_each_init(
        Search::default,
        |search, (i, found)| {
            let row = &points[i * d..][..d];
            let mut near: Vec<u32> =
                graphs.iter().flat_map(|graph| graph.near(row, i, k, search)).collect();
            if near.len() < k {
                // A graph may not reach every row; then compare with all of them.
                near = (0..n as u32).filter(|&j| j as usize != i).collect();
            }
            let mut near: Vec<(f64, u32)> = near
                .into_iter()
                .map(|j| (product(row, &points[j as usize * d..][..d]), j))
                .collect();
            near.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
            found.iter_mut().zip(near).for_each(|(found, (_, j))| *found = j);
        },
    );
    Ok(neighbours)
}

/// A row in a graph. For unit rows, squared distances order as inner products do, reversed.
#[derive(Clone)]
struct GraphRow<'a>(&'a [f32]);

impl Point for GraphRow<'_> {
    fn distance(&self, other: &Self) -> f32 {
        squared_distance(self.0, other.0)
    }
}

/// The graph of one piece: consecutive rows, the first of which is row `first`.
struct Graph<'a> {
    first: usize,
    graph: Hnsw<GraphRow<'a>>,
    /// Maps the graph's own ids to positions in the piece.
    positions: Vec<u32>,
}

impl<'a> Graph<'a> {
    fn new(rows: &'a [f32], d: usize, first: usize, breadth: usize, seed: u64) -> Self {
        let rows: Vec<GraphRow> = rows.chunks(d).map(GraphRow).collect();
        let mut positions = vec![0; rows.len()];
        let builder = Builder::default().ef_construction(breadth).ef_search(breadth).seed(seed);
        let (graph, ids) = builder.build_hnsw(rows);
        for (position, id) in ids.into_iter().enumerate() {
            positions[id.into_inner() as usize] = position as u32;
        }
        Self { first, graph, positions }
    }

    /// Returns up to `k` rows near `row`, nearest first, without row `own`, which is `row` itself.
    fn near(&self, row: &[f32], own: usize, k: usize, search: &mut Search) -> Vec<u32> {
        let found = self.graph.search(&GraphRow(row), search);
        let index =
            found.map(|item| self.first as u32 + self.positions[item.pid.into_inner() as usize]);
        index.filter(|&j| j as usize != own).take(k).collect()
    }
}

/// Builds the graphs of all pieces, each on one thread.
fn build(
    points: &[f32],
    d: usize,
    piece: usize,
    breadth: usize,
    seed: u64,
) -> Result<Vec<Graph<'_>>> {
    let pieces: Vec<&[f32]> = points.chunks(piece * d).collect();
    let next = AtomicUsize::new(0);
    let graphs: Mutex<Vec<Graph>> = Mutex::new(vec![]);
    let work = || -> Result<()> {
        // One thread per graph, because a graph depends on the order in which rows are inserted.
        let alone = rayon::ThreadPoolBuilder::new().num_threads(1).build()?;
        while let Some((i, rows)) = {
            let i = next.fetch_add(1, Ordering::Relaxed);
            pieces.get(i).map(|rows| (i, rows))
        } {
            let graph = alone.install(|| Graph::new(rows, d, i * piece, breadth, seed));
            graphs.lock().expect("no thread panics while it adds a graph").push(graph);
        }
        Ok(())
    };
    std::thread::scope(|scope| -> Result<()> {
        let threads = rayon::current_num_threads().min(pieces.len());
        let started: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in started {
            thread.join().ok().context("a thread panicked while building a graph")??;
        }
        Ok(())
    })?;
    let mut graphs = graphs.into_inner().expect("no thread panicked");
    graphs.sort_by_key(|graph| graph.first);
    Ok(graphs)
}

#[cfg(test)]
mod tests {
    use rand::RngExt;

    use super::*;
    use crate::nearest_neighbours;

    /// Unit rows around ten random directions.
    fn rows(n: usize, d: usize) -> Vec<f32> {
        let mut random = stage::random::stream(4, "rows", &[]);
        let centres: Vec<f32> = (0..10 * d).map(|_| random.random::<f32>() - 0.5).collect();
        let mut rows: Vec<f32> = (0..n * d)
            .map(|i| centres[(i / d % 10) * d + i % d] + 0.5 * (random.random::<f32>() - 0.5))
            .collect();
        points::scale(&mut rows, d, "test").expect("directions");
        rows
    }

    #[test]
    fn most_of_the_nearest_are_found_by_any_number_of_threads() -> Result<()> {
        let (n, d, k) = (1500, 12, 10);
        let points = rows(n, d);
        let config = Approximate { piece: 600, breadth: 60 };
        let found = approximate_neighbours(&points, n, d, k, &config, 1)?;
        let exact = nearest_neighbours(&points, n, d, k)?;
        let hits = (found.chunks(k).zip(exact.chunks(k)))
            .map(|(found, exact)| found.iter().filter(|j| exact.contains(j)).count())
            .sum::<usize>();
        assert!(hits as f64 > 0.97 * (n * k) as f64, "{hits} of {}", n * k);
        for (i, row) in found.chunks(k).enumerate() {
            let products: Vec<f64> = row
                .iter()
                .map(|&j| product(&points[i * d..][..d], &points[j as usize * d..][..d]))
                .collect();
            assert!(products.is_sorted_by(|a, b| a >= b) && !row.contains(&(i as u32)));
        }
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
            let again = pool.install(|| approximate_neighbours(&points, n, d, k, &config, 1))?;
            assert_eq!(again, found);
        }
        Ok(())
    }

    #[test]
    fn few_rows_are_searched_wholly_and_bad_input_is_refused() -> Result<()> {
        let points = rows(30, 5);
        let config = Approximate { piece: 7, breadth: 40 };
        let found = approximate_neighbours(&points, 30, 5, 29, &config, 0)?;
        assert_eq!(found, nearest_neighbours(&points, 30, 5, 29)?);
        let refused = |points: &[f32], k, config: &Approximate| {
            let n = points.len() / 5;
            approximate_neighbours(points, n, 5, k, config, 0).expect_err("refused").to_string()
        };
        let mut long = points.clone();
        long[10] += 3.;
        assert!(refused(&long, 2, &config).contains("row 2"));
        assert!(refused(&points, 30, &config).contains("at most 29"));
        assert!(refused(&points, 2, &Approximate { piece: 0, ..config }).contains("piece"));
        assert!(refused(&points, 3, &Approximate { breadth: 3, ..config }).contains("breadth"));
        assert!(approximate_neighbours(&points, 30, 5, 0, &config, 0)?.is_empty());
        Ok(())
    }
}
