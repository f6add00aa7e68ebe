//! Evenly spread centroids: `K` unit vectors whose pairwise cosines are all `−1/(K − 1)`.
//!
//! Two ways to them. The published one simulates repelling charges on the sphere; it degrades where
//! there are about as many centroids as dimensions. The closed form, a turned regular simplex, is
//! exact wherever such vectors exist with room to spare; taking it is our choice. Either way the
//! centroids are constants: never trained, never decayed.
//!
//! Such vectors are free up to a rotation, and the paper leaves the rotation open. [`turned_to`]
//! finds the one that brings each centroid nearest to a group of features.

use anyhow::{Result, ensure};
use rand_distr::{Distribution, StandardNormal};
use serde::{Deserialize, Serialize};
use stage::random::stream;

/// How centroids are found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "method", deny_unknown_fields)]
pub enum Centroids {
    /// A regular simplex, turned at random: exact. Ours.
    ClosedForm,
    /// The same simplex, turned before the first step so that each centroid is nearest to one group
    /// of pictures: see [`groups`](crate::groups). Ours.
    TurnedToGroups,
    /// Repelling charges, as published with 200 steps of 0.01. Our values may be smaller steps and
    /// damping.
    Simulation {
        /// Steps.
        steps: usize,
        /// Time of one step, `G`.
        time: f64,
        /// Share of the velocity that a step loses; 0 is published.
        damping: f64,
    },
}

impl Centroids {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    ///
    /// The values are out of range, or `clusters` centroids do not fit into `width` dimensions.
    pub fn check(&self, clusters: usize, width: usize) -> Result<()> {
        match *self {
            Self::ClosedForm | Self::TurnedToGroups => ensure!(
                clusters <= width,
                "centroids: the closed form needs as many dimensions as clusters; {clusters} do \
                 not fit into {width}: widen the head or use method = \"simulation\""
            ),
            Self::Simulation { steps, time, damping } => ensure!(
                steps > 0 && time > 0. && time.is_finite() && (0. ..1.).contains(&damping),
                "centroids: steps = {steps}, time = {time}, damping = {damping}: at least one \
                 step of a time above 0, and a damping of at least 0 and below 1"
            ),
        }
        Ok(())
    }

    /// The centroids, `(clusters, width)` row by row, before they are turned to groups; another
    /// rotation for another seed.
    ///
    /// # Errors
    ///
    /// As [`Centroids::check`].
    pub fn place(&self, clusters: usize, width: usize, seed: u64) -> Result<Vec<f64>> {
        self.check(clusters, width)?;
        match *self {
            Self::ClosedForm | Self::TurnedToGroups => Ok(closed_form(clusters, width, seed)),
            Self::Simulation { steps, time, damping } => {
                let mut charges = Charges::random(clusters, width, seed);
                (0..steps).for_each(|_| charges.step(time, damping));
                Ok(charges.places)
            }
        }
    }
}

/// `C = √(K/(K−1)) (I − 11ᵀ/K) Qᵀ`, with `Q` a random `D × K` matrix of orthonormal columns.
fn closed_form(clusters: usize, width: usize, seed: u64) -> Vec<f64> {
    let mut rows = normals(clusters, width, seed);
    orthonormalise(&mut rows, width);
    simplex(rows, width)
}

/// The regular simplex whose centroid `k` is nearest to the mean `m_k`, the row `k` of `means`
/// `(K, D)`: of all `C` of the closed form, the one of largest `Σₖ ⟨cₖ, mₖ⟩`.
///
/// It has `Qᵀ = polar((I − 11ᵀ/K) M)` (orthogonal Procrustes problem), found by the iteration
/// `X ← 3/2 X − 1/2 XXᵀX` of Newton and Schulz. Directions in which the means do not differ are
/// filled at random.
pub(crate) fn turned_to(means: &[f64], clusters: usize, width: usize, seed: u64) -> Vec<f64> {
    let mut x = centred(means.to_vec(), width);
    normalise(&mut x);
    // Far below any difference of means, and enough for the iteration to start from.
    x.iter_mut().zip(normals(clusters, width, seed)).for_each(|(x, draw)| *x += 1e-7 * draw);
    normalise(&mut x);
    for _ in 0..POLAR_STEPS {
        let mut next: Vec<f64> = x.iter().map(|x| 1.5 * x).collect();
        for (next, row) in next.chunks_exact_mut(width).zip(x.chunks_exact(width)) {
            for other in x.chunks_exact(width) {
                let along = 0.5 * dot(row, other);
                next.iter_mut().zip(other).for_each(|(next, x)| *next -= along * x);
            }
        }
        x = next;
    }
    simplex(x, width)
}

/// Steps of the polar iteration. A small singular value grows by half in each: 50 steps raise one
/// of 1e-8 to 1, and the others converge quadratically.
const POLAR_STEPS: usize = 60;

/// Makes the rows orthonormal, the first one first.
fn orthonormalise(rows: &mut [f64], width: usize) {
    for done in 0..rows.len() / width {
        let (before, rest) = rows.split_at_mut(done * width);
        let row = &mut rest[..width];
        // Twice: what rounding left of the others' directions goes with the second pass.
        for _ in 0..2 {
            for other in before.chunks_exact(width) {
                let along = dot(row, other);
                row.iter_mut().zip(other).for_each(|(x, o)| *x -= along * o);
            }
        }
        normalise(row);
    }
}

/// `√(K/(K−1)) (I − 11ᵀ/K)` times orthonormal rows `(K, D)`.
fn simplex(rows: Vec<f64>, width: usize) -> Vec<f64> {
    let k = (rows.len() / width) as f64;
    let scale = (k / (k - 1.)).sqrt();
    centred(rows, width).into_iter().map(|x| scale * x).collect()
}

/// The rows without their mean.
fn centred(mut rows: Vec<f64>, width: usize) -> Vec<f64> {
    let k = (rows.len() / width) as f64;
    let mut mean = vec![0.; width];
    for row in rows.chunks_exact(width) {
        mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += x / k);
    }
    for row in rows.chunks_exact_mut(width) {
        row.iter_mut().zip(&mean).for_each(|(x, mean)| *x -= mean);
    }
    rows
}

/// Charges on the unit sphere, each with a velocity.
#[derive(Debug, Clone)]
struct Charges {
    width: usize,
    /// `r`, `(K, D)`, unit rows.
    places: Vec<f64>,
    /// `v`, `(K, D)`.
    velocities: Vec<f64>,
}

impl Charges {
    fn random(clusters: usize, width: usize, seed: u64) -> Self {
        let mut places = normals(clusters, width, seed);
        places.chunks_exact_mut(width).for_each(normalise);
        Self { width, velocities: vec![0.; places.len()], places }
    }

    /// `F_m = Σ_{n≠m} (r_m − r_n) / max(|r_m − r_n|, 0.01)³`.
    fn forces(&self) -> Vec<f64> {
        let mut forces = vec![0.; self.places.len()];
        let rows = || self.places.chunks_exact(self.width);
        for (m, (force, here)) in forces.chunks_exact_mut(self.width).zip(rows()).enumerate() {
            for (_, there) in rows().enumerate().filter(|(n, _)| *n != m) {
                let distance: f64 =
                    here.iter().zip(there).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt();
                let weight = distance.max(0.01).powi(-3);
                for ((force, a), b) in force.iter_mut().zip(here).zip(there) {
                    *force += weight * (a - b);
                }
            }
        }
        forces
    }

    /// The forces without their radial part.
    fn tangential_forces(&self) -> Vec<f64> {
        let mut forces = self.forces();
        let rows = self.places.chunks_exact(self.width);
        for (force, here) in forces.chunks_exact_mut(self.width).zip(rows) {
            let radial = dot(force, here);
            force.iter_mut().zip(here).for_each(|(force, x)| *force -= radial * x);
        }
        forces
    }

    /// `r ← normalise(r + v)` with the old velocity, then `v ← (1 − damping) v + G F`.
    fn step(&mut self, time: f64, damping: f64) {
        let forces = self.tangential_forces();
        for (place, velocity) in self.places.iter_mut().zip(&self.velocities) {
            *place += velocity;
        }
        self.places.chunks_exact_mut(self.width).for_each(normalise);
        for (velocity, force) in self.velocities.iter_mut().zip(&forces) {
            *velocity = (1. - damping) * *velocity + time * force;
        }
    }
}

fn normals(rows: usize, width: usize, seed: u64) -> Vec<f64> {
    let mut random = stream(seed, "centroids", &[]);
    StandardNormal.sample_iter(&mut random).take(rows * width).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Scales a row to unit length; zeros stay.
fn normalise(row: &mut [f64]) {
    let length = dot(row, row).sqrt().max(f64::MIN_POSITIVE);
    row.iter_mut().for_each(|x| *x /= length);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest distance of a pairwise cosine from `−1/(K − 1)`, and of a length from 1.
    fn errors(places: &[f64], width: usize) -> (f64, f64) {
        let rows: Vec<&[f64]> = places.chunks_exact(width).collect();
        let want = -1. / (rows.len() as f64 - 1.);
        let (mut cosines, mut lengths) = (0f64, 0f64);
        for (m, a) in rows.iter().enumerate() {
            lengths = lengths.max((dot(a, a).sqrt() - 1.).abs());
            for b in &rows[m + 1..] {
                cosines = cosines.max((dot(a, b) - want).abs());
            }
        }
        (cosines, lengths)
    }

    fn assert_near(got: &[f64], want: &[f64], within: f64) {
        for (got, want) in got.iter().zip(want) {
            assert!((got - want).abs() < within, "got {got}, want {want}");
        }
    }

    /// ICBPL, case T1.
    #[test]
    fn two_charges_move_as_specified() {
        let mut charges =
            Charges { width: 2, places: vec![1., 0., 0., 1.], velocities: vec![0.; 4] };
        let f = 0.353553;
        assert_near(&charges.forces(), &[f, -f, -f, f], 1e-6);
        assert_near(&charges.tangential_forces(), &[0., -f, -f, 0.], 1e-6);
        charges.step(0.01, 0.);
        assert_eq!(charges.places, [1., 0., 0., 1.]);
        assert_near(&charges.velocities, &[0., -0.003536, -0.003536, 0.], 1e-6);
        charges.step(0.01, 0.);
        assert_near(&charges.places, &[0.999994, -0.003536, -0.003536, 0.999994], 1e-6);
        assert_near(&charges.velocities, &[0., -0.007071, -0.007071, 0.], 1e-6);
    }

    /// ICBPL, case T2.
    #[test]
    fn the_published_simulation_comes_near() -> Result<()> {
        let published = Centroids::Simulation { steps: 200, time: 0.01, damping: 0. };
        for seed in 0..200 {
            let (cosines, lengths) = errors(&published.place(10, 100, seed)?, 100);
            assert!(cosines < 2e-3, "seed {seed}: off by {cosines}");
            assert!(lengths < 1e-12, "seed {seed}: {lengths}");
        }
        Ok(())
    }

    /// ICBPL, case T3.
    #[test]
    fn the_closed_form_is_exact() -> Result<()> {
        for (k, width) in [(10, 100), (100, 100), (2, 100), (3, 3)] {
            let places = Centroids::ClosedForm.place(k, width, 7)?;
            let (cosines, lengths) = errors(&places, width);
            assert!(cosines < 1e-12 && lengths < 1e-12, "{k} in {width}: {cosines} {lengths}");
            let sum = |column: usize| places.chunks_exact(width).map(|r| r[column]).sum::<f64>();
            assert!((0..width).all(|column| sum(column).abs() < 1e-12), "{k} in {width}");
        }
        let two = Centroids::ClosedForm.place(2, 5, 1)?;
        assert_near(&two[..5], &two[5..].iter().map(|x| -x).collect::<Vec<_>>(), 1e-12);
        assert_ne!(two, Centroids::ClosedForm.place(2, 5, 2)?);
        assert!(Centroids::ClosedForm.place(6, 5, 1).is_err());
        Ok(())
    }

    #[test]
    fn a_turned_simplex_is_exact_and_nearest_to_the_means() -> Result<()> {
        for (k, width) in [(10, 100), (2, 5), (3, 3)] {
            // Means with a large common part, as features of a random head have.
            let own = normals(k, width, 5);
            let means: Vec<f64> =
                own.iter().enumerate().map(|(i, x)| 0.05 * x + 1. + (i % width) as f64).collect();
            let places = turned_to(&means, k, width, 1);
            let (cosines, lengths) = errors(&places, width);
            assert!(cosines < 1e-12 && lengths < 1e-12, "{k} in {width}: {cosines} {lengths}");
            for (number, mean) in centred(means.clone(), width).chunks_exact(width).enumerate() {
                let cosines = places.chunks_exact(width).map(|place| dot(place, mean));
                let nearest = cosines.enumerate().max_by(|a, b| a.1.total_cmp(&b.1));
                assert_eq!(nearest.map(|found| found.0), Some(number), "{k} in {width}");
            }
            let gain = dot(&places, &means);
            for seed in 0..50 {
                let other = dot(&closed_form(k, width, seed), &means);
                assert!(other < gain, "{k} in {width}, seed {seed}: {other} {gain}");
            }
            let reversed: Vec<f64> = means.chunks_exact(width).rev().flatten().copied().collect();
            let of_reversed = dot(&turned_to(&reversed, k, width, 1), &reversed);
            assert!((of_reversed - gain).abs() < 1e-6 * gain, "{of_reversed} {gain}");
        }
        Ok(())
    }

    /// Two centroids nearest to one and the same place must still be two.
    #[test]
    fn equal_means_get_different_centroids() {
        let (k, width) = (4, 6);
        let mut means = normals(k, width, 9);
        means.copy_within(..width, width);
        for means in [means, vec![0.; k * width]] {
            let (cosines, lengths) = errors(&turned_to(&means, k, width, 1), width);
            assert!(cosines < 1e-9 && lengths < 1e-9, "{cosines} {lengths}");
        }
    }

    #[test]
    fn a_damped_simulation_places_one_centroid_more_than_dimensions() -> Result<()> {
        // A triangle in the plane, which the closed form does not reach.
        let gentle = Centroids::Simulation { steps: 4000, time: 0.01, damping: 0.1 };
        let (cosines, _) = errors(&gentle.place(3, 2, 1)?, 2);
        assert!(cosines < 1e-6, "{cosines}");
        assert!(Centroids::Simulation { steps: 0, time: 0.1, damping: 0. }.check(3, 2).is_err());
        Ok(())
    }
}
