//! Evenly spread centroids: `K` unit vectors whose pairwise cosines are all `−1/(K − 1)`.
//!
//! Two ways to them. The published one simulates repelling charges on the sphere; it degrades where
//! there are about as many centroids as dimensions. The closed form, a turned regular simplex, is
//! exact wherever such vectors exist with room to spare; taking it is our choice. Either way the
//! centroids are constants: never trained, never decayed.

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
            Self::ClosedForm => ensure!(
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

    /// The centroids, `(clusters, width)` row by row; another rotation for another seed.
    ///
    /// # Errors
    ///
    /// As [`Centroids::check`].
    pub fn place(&self, clusters: usize, width: usize, seed: u64) -> Result<Vec<f64>> {
        self.check(clusters, width)?;
        match *self {
            Self::ClosedForm => Ok(closed_form(clusters, width, seed)),
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
    // Rows of `q` are the columns of Q.
    let mut q = normals(clusters, width, seed);
    for done in 0..clusters {
        let (before, rest) = q.split_at_mut(done * width);
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
    let k = clusters as f64;
    let mut mean = vec![0.; width];
    for row in q.chunks_exact(width) {
        mean.iter_mut().zip(row).for_each(|(mean, x)| *mean += x / k);
    }
    let scale = (k / (k - 1.)).sqrt();
    for row in q.chunks_exact_mut(width) {
        row.iter_mut().zip(&mean).for_each(|(x, mean)| *x = scale * (*x - mean));
    }
    q
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

fn normalise(row: &mut [f64]) {
    let length = dot(row, row).sqrt();
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
    fn a_damped_simulation_places_one_centroid_more_than_dimensions() -> Result<()> {
        // A triangle in the plane, which the closed form does not reach.
        let gentle = Centroids::Simulation { steps: 4000, time: 0.01, damping: 0.1 };
        let (cosines, _) = errors(&gentle.place(3, 2, 1)?, 2);
        assert!(cosines < 1e-6, "{cosines}");
        assert!(Centroids::Simulation { steps: 0, time: 0.1, damping: 0. }.check(3, 2).is_err());
        Ok(())
    }
}
