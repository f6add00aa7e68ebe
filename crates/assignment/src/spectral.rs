//! The spectrum of the graph of nearest neighbours: how many nearly separate parts it has.

use anyhow::{Result, ensure};
use rand::RngExt;
use rayon::prelude::*;
use stage::random::stream;

use crate::neighbours::nearest_neighbours;

/// The smallest `count` eigenvalues of the normalised Laplacian of the graph of nearest neighbours,
/// rising from 0.
///
/// `L = I − D^(−½) A D^(−½)` with `A = (B + Bᵀ) / 2`, where `B_ij = 1` if `j` is among the `neighbours`
/// nearest of `i` by inner product. A graph of `K` nearly separate parts has `K` eigenvalues near 0, so
/// that the gap after the `K`-th is large: the eigengap (von Luxburg 2007, arXiv:0711.0189, section 8.3).
/// It follows neighbours, so that long thin clusters count as one.
///
/// By subspace iteration on `(2I − L) / 2` and Rayleigh-Ritz; the last eigenvalues asked for are the least
/// exact. Bit-identical for any number of threads.
///
/// - `unit`: rows of unit length, `(N, d)`.
///
/// # Errors
///
/// There are fewer rows than `count` or no more than `neighbours`, or no neighbours are asked for.
pub fn neighbour_graph_eigenvalues(
    unit: &[f32],
    n: usize,
    d: usize,
    neighbours: usize,
    count: usize,
) -> Result<Vec<f64>> {
    ensure!(neighbours > 0, "neighbour_graph_eigenvalues: a graph needs at least 1 neighbour");
    ensure!(
        (1..=n).contains(&count),
        "neighbour_graph_eigenvalues: {count} eigenvalues of a graph of {n} points"
    );
    let near = nearest_neighbours(unit, n, d, neighbours)?;
    let graph = SparseGraph::new(&near, neighbours);
    let width = (count + EXTRA).min(n);
    let mut random = stream(0, "subspace iteration", &[]);
    let mut basis: Vec<Vec<f64>> =
        (0..width).map(|_| (0..n).map(|_| random.random_range(-1f64..1.)).collect()).collect();
    orthonormalise(&mut basis);
    for _ in 0..ROUNDS {
        basis.par_iter_mut().for_each(|vector| {
            for _ in 0..POWERS {
                *vector = graph.smoothed(vector);
            }
        });
        orthonormalise(&mut basis);
    }
    let images: Vec<Vec<f64>> = basis.par_iter().map(|vector| graph.smoothed(vector)).collect();
    let projected: Vec<f64> =
        basis.iter().flat_map(|a| images.iter().map(|b| dot(a, b)).collect::<Vec<_>>()).collect();
    let mut values = symmetric_eigenvalues(projected, width);
    values.sort_by(|a, b| b.total_cmp(a));
    Ok(values[..count].iter().map(|value| (2. - 2. * value).max(0.)).collect())
}

/// Vectors beyond those asked for, which make them converge.
const EXTRA: usize = 10;
/// Rounds of [`POWERS`] products each.
const ROUNDS: usize = 40;
const POWERS: usize = 4;

/// `D^(−½) A D^(−½)`, row by row.
struct SparseGraph {
    rows: Vec<Vec<(u32, f64)>>,
}

impl SparseGraph {
    fn new(near: &[u32], neighbours: usize) -> Self {
        let n = near.len() / neighbours;
        let mut rows = vec![Vec::new(); n];
        for (i, row) in near.chunks_exact(neighbours).enumerate() {
            for &j in row {
                rows[i].push((j, 0.5));
                rows[j as usize].push((i as u32, 0.5));
            }
        }
        let degree = |row: &Vec<(u32, f64)>| row.iter().map(|(_, weight)| weight).sum::<f64>();
        let roots: Vec<f64> = rows.iter().map(|row| degree(row).sqrt()).collect();
        for (row, root) in rows.iter_mut().zip(&roots) {
            row.iter_mut().for_each(|(j, weight)| *weight /= root * roots[*j as usize]);
            row.sort_unstable_by_key(|&(j, _)| j);
        }
        Self { rows }
    }

    /// `(x + D^(−½) A D^(−½) x) / 2`, whose eigenvalues are in `[0, 1]`.
    fn smoothed(&self, x: &[f64]) -> Vec<f64> {
        let sum = |row: &Vec<(u32, f64)>| row.iter().map(|&(j, w)| w * x[j as usize]).sum::<f64>();
        self.rows.iter().zip(x).map(|(row, x)| 0.5 * (x + sum(row))).collect()
    }
}

/// Modified Gram-Schmidt, twice.
fn orthonormalise(basis: &mut [Vec<f64>]) {
    for i in 0..basis.len() {
        let (done, rest) = basis.split_at_mut(i);
        let own = &mut rest[0];
        for _ in 0..2 {
            for other in done.iter() {
                let along = dot(own, other);
                own.iter_mut().zip(other).for_each(|(x, y)| *x -= along * y);
            }
        }
        let length = dot(own, own).sqrt().max(f64::MIN_POSITIVE);
        own.iter_mut().for_each(|x| *x /= length);
    }
}

/// All eigenvalues of a symmetric matrix, by Jacobi's rotations (Golub and Van Loan 2013, 8.5).
fn symmetric_eigenvalues(mut a: Vec<f64>, n: usize) -> Vec<f64> {
    for _ in 0..50 {
        let off: f64 = (0..n)
            .flat_map(|i| (0..i).map(move |j| (i, j)))
            .map(|(i, j)| a[i * n + j].powi(2))
            .sum();
        if off < 1e-24 {
            break;
        }
        for p in 0..n {
            for q in p + 1..n {
                let apq = a[p * n + q];
                if apq.abs() < 1e-300 {
                    continue;
                }
                let theta = (a[q * n + q] - a[p * n + p]) / (2. * apq);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.).sqrt());
                let c = 1. / (t * t + 1.).sqrt();
                let s = t * c;
                for k in 0..n {
                    let (x, y) = (a[k * n + p], a[k * n + q]);
                    (a[k * n + p], a[k * n + q]) = (c * x - s * y, s * x + c * y);
                }
                for k in 0..n {
                    let (x, y) = (a[p * n + k], a[q * n + k]);
                    (a[p * n + k], a[q * n + k]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
    }
    (0..n).map(|i| a[i * n + i]).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use super::*;

    #[test]
    fn eigenvalues_of_a_matrix_are_those_of_its_polynomial() {
        // (2 − λ)² = 1, and 5.
        let mut found = symmetric_eigenvalues(vec![2., 1., 0., 1., 2., 0., 0., 0., 5.], 3);
        found.sort_by(f64::total_cmp);
        for (got, want) in found.iter().zip([1., 3., 5.]) {
            assert!((got - want).abs() < 1e-12, "{found:?}");
        }
    }

    /// The graph of a circle: `1 − cos(2πj/n)`, each twice but the first.
    #[test]
    fn a_circle_has_the_spectrum_of_a_circle() -> Result<()> {
        let n = 24;
        let unit: Vec<f32> = (0..n)
            .flat_map(|i| {
                let angle = 2. * PI * i as f64 / n as f64;
                [angle.cos() as f32, angle.sin() as f32]
            })
            .collect();
        let found = neighbour_graph_eigenvalues(&unit, n, 2, 2, 5)?;
        for (got, j) in found.iter().zip([0., 1., 1., 2., 2.]) {
            let want = 1. - (2. * PI * j / n as f64).cos();
            assert!((got - want).abs() < 1e-6, "{found:?}");
        }
        Ok(())
    }

    /// Three complete graphs of four points: three times 0, then 4/3.
    #[test]
    fn separate_parts_are_counted() -> Result<()> {
        let mut unit = vec![0f32; 12 * 3];
        (0..12).for_each(|i| unit[i * 3 + i / 4] = 1.);
        let found = neighbour_graph_eigenvalues(&unit, 12, 3, 3, 5)?;
        for (got, want) in found.iter().zip([0., 0., 0., 4. / 3., 4. / 3.]) {
            assert!((got - want).abs() < 1e-9, "{found:?}");
        }
        assert!(neighbour_graph_eigenvalues(&unit, 12, 3, 0, 5).is_err());
        assert!(neighbour_graph_eigenvalues(&unit, 12, 3, 3, 13).is_err());
        Ok(())
    }
}
