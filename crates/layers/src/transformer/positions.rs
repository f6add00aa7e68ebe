//! Positions of patches on one grid: learned ones, resampled, or rotations.

use crate::transformer::{Positions, Resampling, TransformerPlan};

/// Positions on one grid of patches.
pub(super) struct GridPositions {
    /// Rows of patches.
    pub rows: usize,
    /// Columns of patches.
    pub columns: usize,
    /// A vector for each patch, row by row: what is added to the tokens, or zeros.
    pub added: Vec<f32>,
    /// Cosines and sines of rotary positions, (patches, e/2) each.
    pub rotation: Option<[Vec<f32>; 2]>,
}

impl GridPositions {
    pub fn new(
        plan: &TransformerPlan,
        learned: Option<&[f32]>,
        [rows, columns]: [usize; 2],
    ) -> Self {
        let zeros = || vec![0.; rows * columns * plan.width];
        let (added, rotation) = match plan.positions {
            Positions::Absolute { grid, resampling } => {
                let learned = learned.expect("absolute positions are learned");
                (resample(learned, grid, [rows, columns], resampling), None)
            }
            Positions::Rotary { base } => {
                (zeros(), Some(rotation(plan.head_width(), base, [rows, columns])))
            }
        };
        GridPositions { rows, columns, added, rotation }
    }

    pub fn patches(&self) -> usize {
        self.rows * self.columns
    }
}

/// Resamples learned positions (M², d) to another grid, each channel by itself: columns and rows are mixed
/// separately. The same grid is copied.
pub(super) fn resample(
    learned: &[f32],
    grid: usize,
    [rows, columns]: [usize; 2],
    rule: Resampling,
) -> Vec<f32> {
    if [rows, columns] == [grid, grid] {
        return learned.to_vec();
    }
    let width = learned.len() / (grid * grid);
    let (of_rows, of_columns) = (taps(grid, rows, rule), taps(grid, columns, rule));
    let mut resampled = Vec::with_capacity(rows * columns * width);
    for row in &of_rows {
        // A row of the new grid at the columns of the old one.
        let mut mixed = vec![0f64; grid * width];
        for (from, weight) in row {
            let from = &learned[from * grid * width..][..grid * width];
            mixed.iter_mut().zip(from).for_each(|(to, x)| *to += weight * f64::from(*x));
        }
        for column in &of_columns {
            let mut sum = vec![0f64; width];
            for (from, weight) in column {
                let from = &mixed[from * width..][..width];
                sum.iter_mut().zip(from).for_each(|(to, x)| *to += weight * x);
            }
            resampled.extend(sum.iter().map(|x| *x as f32));
        }
    }
    resampled
}

/// For each of `to` new places, the old places that it mixes, out of `from`, and their weights.
fn taps(from: usize, to: usize, rule: Resampling) -> Vec<Vec<(usize, f64)>> {
    (0..to)
        .map(|i| match rule {
            Resampling::Size => four_taps(from, (i as f64 + 0.5) * from as f64 / to as f64 - 0.5),
            Resampling::Offset => {
                four_taps(from, (i as f64 + 0.5) * from as f64 / (to as f64 + 0.1) - 0.5)
            }
            Resampling::Antialias => stretched_taps(from, from as f64 / to as f64, i),
        })
        .collect()
}

/// Four taps around a source coordinate; places beyond the border are clamped to it.
fn four_taps(from: usize, source: f64) -> Vec<(usize, f64)> {
    let first = source.floor() as isize - 1;
    let place = |at: isize| at.clamp(0, from as isize - 1) as usize;
    (first..first + 4).map(|at| (place(at), cubic(source - at as f64, -0.75))).collect()
}

/// The taps within two places of the centre, in units of the wider of the two spacings; weights add up to 1.
fn stretched_taps(from: usize, scale: f64, i: usize) -> Vec<(usize, f64)> {
    let (centre, spacing) = (scale * (i as f64 + 0.5), scale.max(1.));
    let support = 2. * spacing;
    let first = (centre - support + 0.5).max(0.) as usize;
    let end = ((centre + support + 0.5) as usize).min(from);
    let weight = |at: usize| cubic((at as f64 - centre + 0.5) / spacing, -0.5);
    let sum: f64 = (first..end).map(weight).sum();
    (first..end).map(|at| (at, weight(at) / sum)).collect()
}

/// The kernel of cubic convolution with parameter `a` (Keys 1981).
fn cubic(x: f64, a: f64) -> f64 {
    let x = x.abs();
    if x <= 1. {
        ((a + 2.) * x - (a + 3.)) * x * x + 1.
    } else if x < 2. {
        (((x - 5.) * x + 8.) * x - 4.) * a
    } else {
        0.
    }
}

/// Cosines and sines of DINOv3's angles (arXiv:2508.10104): `2π y f_m`, then `2π x f_m`, with patch centres
/// `y = 2 (i + ½)/rows − 1` and `x` likewise, and frequencies `f_m = θ^(−4m/e)`, m = 0 … e/4 − 1.
fn rotation(head_width: usize, base: f64, [rows, columns]: [usize; 2]) -> [Vec<f32>; 2] {
    let frequency = |m: usize| base.powf(-4. * m as f64 / head_width as f64);
    let frequencies: Vec<f64> = (0..head_width / 4).map(frequency).collect();
    let centre = |i: usize, n: usize| 2. * (i as f64 + 0.5) / n as f64 - 1.;
    let mut angles = vec![];
    for (row, column) in (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column))) {
        for at in [centre(row, rows), centre(column, columns)] {
            angles.extend(frequencies.iter().map(|f| std::f64::consts::TAU * at * f));
        }
    }
    [f64::cos, f64::sin].map(|f| angles.iter().map(|angle| f(*angle) as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The figures of a head of width 16 with θ = 100, on a grid of 4 × 4.
    #[test]
    fn rotations_have_the_published_angles() {
        let [cosines, sines] = rotation(16, 100., [4, 4]);
        assert_eq!(cosines.len(), 16 * 8);
        // Patch (0, 0): y = x = −.75, so the first angle is 2π · (−.75).
        assert!(cosines[0].abs() < 1e-7 && (sines[0] - 1.).abs() < 1e-7);
        for (m, f) in [1., 0.316_227_766, 0.1, 0.031_622_777].into_iter().enumerate() {
            let angle: f64 = std::f64::consts::TAU * -0.75 * f;
            for (axis, at) in [m, 4 + m].into_iter().enumerate() {
                assert!((f64::from(cosines[at]) - angle.cos()).abs() < 1e-6, "axis {axis}, {m}");
                assert!((f64::from(sines[at]) - angle.sin()).abs() < 1e-6, "axis {axis}, {m}");
            }
        }
        // Two axes of other lengths: patch (0, 2) of 2 × 3 has y = −½ and x = ⅔.
        let [_, sines] = rotation(4, 100., [2, 3]);
        let want = [-0.5f64, 2. / 3.].map(|at| (std::f64::consts::TAU * at).sin());
        assert!((f64::from(sines[4]) - want[0]).abs() < 1e-6);
        assert!((f64::from(sines[5]) - want[1]).abs() < 1e-6);
    }

    #[test]
    fn weights_of_every_rule_add_up_to_one() {
        for rule in [Resampling::Size, Resampling::Offset, Resampling::Antialias] {
            for (from, to) in [(5, 4), (5, 6), (37, 16), (7, 7), (1, 3), (14, 1)] {
                for (i, taps) in taps(from, to, rule).iter().enumerate() {
                    let sum: f64 = taps.iter().map(|(_, weight)| weight).sum();
                    assert!((sum - 1.).abs() < 1e-12, "{rule:?} {from} to {to}, {i}: {sum}");
                    assert!(taps.iter().all(|(at, _)| *at < from));
                }
            }
        }
    }

    /// Place 1 of a grid of 4, resampled from 8, by hand. Source by size: 1.5 · 2 − ½ = 2½, so its taps are
    /// half a place and one and a half from it: k(½) = .59375, k(1½) = −.09375 with a = −¾.
    #[test]
    fn taps_match_a_hand_computation() {
        let size = &taps(8, 4, Resampling::Size)[1];
        assert_eq!(size, &[(1, -0.09375), (2, 0.59375), (3, 0.59375), (4, -0.09375)]);
        // By the offset rule: 1.5 · 8 / 4.1 − ½ = 2.426829…
        let offset = &taps(8, 4, Resampling::Offset)[1];
        let x = 1.5 * 8. / 4.1 - 2.5;
        assert_eq!(offset[1].0, 2);
        assert!((offset[1].1 - ((1.25 * x - 2.25) * x * x + 1.)).abs() < 1e-12);
        // Antialiased: centre 3, support 4, kernel with a = −½ at steps of ½ from ¼ on.
        let smooth = &taps(8, 4, Resampling::Antialias)[1];
        let places: Vec<usize> = smooth.iter().map(|(at, _)| *at).collect();
        assert_eq!(places, [0, 1, 2, 3, 4, 5, 6]);
        let near = |x: f64| (1.5 * x - 2.5) * x * x + 1.;
        let far = |x: f64| -0.5 * (((x - 5.) * x + 8.) * x - 4.);
        let sum = 2. * (near(0.25) + near(0.75) + far(1.25)) + far(1.75);
        assert!((smooth[2].1 - near(0.25) / sum).abs() < 1e-12, "{smooth:?}");
        assert!((smooth[6].1 - far(1.75) / sum).abs() < 1e-12, "{smooth:?}");
    }

    #[test]
    fn rows_and_columns_are_not_exchanged() {
        // Two channels of a 2 × 2 grid: the row, and ten times the column.
        let learned = [0., 0., 0., 10., 1., 0., 1., 10.];
        for rule in [Resampling::Size, Resampling::Offset, Resampling::Antialias] {
            let resampled = resample(&learned, 2, [1, 2], rule);
            assert_eq!(resampled.len(), 4);
            assert_eq!(resampled[0], resampled[2], "{rule:?}: the row is the same");
            assert!(resampled[3] - resampled[1] > 5., "{rule:?}: {resampled:?}");
        }
        assert_eq!(resample(&learned, 2, [2, 2], Resampling::Offset), learned);
    }

    /// Pretrained networks, case T11, and Pretrained networks, case T20: against values computed in f64 by PyTorch, in the folder that `ASSORT_GOLDEN` names.
    #[test]
    fn every_rule_matches_reference_values() -> candle_core::Result<()> {
        let Some(folder) = std::env::var_os("ASSORT_GOLDEN").map(std::path::PathBuf::from) else {
            eprintln!("skipped: ASSORT_GOLDEN names no folder of reference values");
            return Ok(());
        };
        let load =
            |file| candle_core::safetensors::load(folder.join(file), &candle_core::Device::Cpu);
        let (grids, networks) = (load("vit/vit.safetensors")?, load("timm.safetensors")?);
        // Channels first.
        let learned =
            grids["prim_positions/in/grid"].squeeze(0)?.permute((1, 2, 0))?.contiguous()?;
        let learned: Vec<f32> = learned.flatten_all()?.to_vec1()?;
        for [rows, columns] in [[4, 4], [4, 6], [7, 3]] {
            for (rule, name) in [
                (Resampling::Size, "bicubic"),
                (Resampling::Offset, "hub_offset"),
                (Resampling::Antialias, "bicubic_antialias"),
            ] {
                let want = &grids[&format!("prim_positions_5to{rows}x{columns}/out/{name}@f64")];
                let want = want.squeeze(0)?.permute((1, 2, 0))?.contiguous()?.flatten_all()?;
                check(&resample(&learned, 5, [rows, columns], rule), &want.to_vec1()?, name);
            }
        }
        // After the class token's.
        for (from, to) in [(37, 16), (4, 7), (5, 4)] {
            let rows = |name: &str| {
                let all = networks[&format!("pos_resample_{from}to{to}/{name}")].squeeze(0)?;
                all.narrow(0, 1, all.dim(0)? - 1)?.flatten_all()
            };
            let learned: Vec<f32> = rows("in/pos_embed")?.to_vec1()?;
            for (rule, name) in [
                (Resampling::Size, "bicubic"),
                (Resampling::Offset, "dinov2_offset"),
                (Resampling::Antialias, "bicubic_antialias"),
            ] {
                let want = rows(&format!("out/{name}@f64"))?.to_vec1()?;
                check(&resample(&learned, from, [to, to], rule), &want, name);
            }
        }
        // Repeated once in the file: a head is 16 wide.
        for (rows, columns) in [(4, 4), (6, 6), (4, 6)] {
            let [cosines, sines] = rotation(16, 100., [rows, columns]);
            for (got, name) in [(cosines, "rope_cos"), (sines, "rope_sin")] {
                let case = format!("hf_dinov3_narrow_{}x{}", 16 * rows, 16 * columns);
                let want = grids[&format!("{case}/out/{name}@f64")].reshape(((), 16))?;
                let want = want.narrow(1, 0, 8)?.contiguous()?.flatten_all()?;
                check(&got, &want.to_vec1()?, name);
            }
        }
        Ok(())
    }

    fn check(got: &[f32], want: &[f64], name: &str) {
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(want) {
            assert!((f64::from(*got) - want).abs() < 1e-6, "{name}: {got}, {want}");
        }
    }
}
