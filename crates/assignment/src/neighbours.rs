//! Exact nearest neighbours by inner product.

use anyhow::{Result, ensure};
use rayon::prelude::*;

use crate::points;

/// The `k` nearest rows of each row of `points` `(N, D)`: those with the highest inner product.
///
/// Rows of unit length make this the cosine. A row is not its own neighbour; equal products are
/// ordered by index. Returns `(N, k)` indices, nearest first.
///
/// # Errors
///
/// The points are no `(n, d)` matrix of finite numbers (the row is named), or there are not `k`
/// other rows.
pub fn nearest_neighbours(points: &[f32], n: usize, d: usize, k: usize) -> Result<Vec<u32>> {
    points::check(points, n, d, "nearest_neighbours")?;
    ensure!(
        k < n,
        "nearest_neighbours: {k} neighbours of each of {n} points; at most {} others exist",
        n.saturating_sub(1)
    );
    let mut neighbours = vec![0u32; n * k];
    if k == 0 {
        return Ok(neighbours);
    }
    neighbours.par_chunks_mut(k).enumerate().for_each(|(i, neighbours)| {
        let row = &points[i * d..][..d];
        let mut products: Vec<(f32, u32)> = points
            .chunks(d)
            .enumerate()
            .filter(|&(j, _)| j != i)
            .map(|(j, other)| (points::dot(row, other), j as u32))
            .collect();
        let nearer = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        products.select_nth_unstable_by(k - 1, nearer);
        products[..k].sort_unstable_by(nearer);
        neighbours.iter_mut().zip(&products).for_each(|(index, product)| *index = product.1);
    });
    Ok(neighbours)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_ordered_by_product_without_self() -> Result<()> {
        let points = [1f32, 0., 0.9, 0.1, 0., 1., -1., 0., 0.5, 0.5];
        let found = nearest_neighbours(&points, 5, 2, 4)?;
        // Products of row 0: 0.9, 0, −1, 0.5 with rows 1 to 4.
        assert_eq!(found[..4], [1, 4, 2, 3]);
        for (i, row) in found.chunks(4).enumerate() {
            assert!(!row.contains(&(i as u32)));
        }
        Ok(())
    }

    #[test]
    fn equal_products_are_ordered_by_index() -> Result<()> {
        let found = nearest_neighbours(&[1f32, 0.].repeat(40), 40, 2, 3)?;
        assert_eq!(found[..9], [1, 2, 3, 0, 2, 3, 0, 1, 3]);
        assert_eq!(found[117..], [0, 1, 2]);
        Ok(())
    }

    #[test]
    fn bad_input_is_refused() {
        let error = nearest_neighbours(&[1., 2.], 2, 1, 2).expect_err("too many").to_string();
        assert!(error.contains("at most 1"), "{error}");
        let error = nearest_neighbours(&[1., f32::NAN], 2, 1, 1).expect_err("NaN").to_string();
        assert!(error.contains("row 1"), "{error}");
        assert!(nearest_neighbours(&[1., 2.], 2, 1, 0).expect("none").is_empty());
    }
}
