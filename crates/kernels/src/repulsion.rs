//! The push of many points on a few, as in the gradient of t-SNE.

use crate::variant::for_each_variant;

/// Points that are pushed at once.
pub const LANES: usize = 16;

/// The coordinates of up to [`LANES`] points: x of each, then y of each.
pub type LanePositions = [[f32; LANES]; 2];

/// The sums of each lane over the points that push it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Repulsion {
    /// `Σ_j c_j w_j² (y − y_j)`: x of each lane, then y of each.
    pub push: LanePositions,
    /// `Σ_j c_j w_j`.
    pub weight: [f32; LANES],
}

for_each_variant! {
    /// Adds the push of `sources` to `sums`, where the weight of a source is that of Student's distribution,
    /// `w_j = 1 / (1 + ‖y − y_j‖²)`: van der Maaten and Hinton 2008, Eq. 4.
    ///
    /// - `lanes`: the positions `y` that are pushed.
    /// - `sources`: position and number of points, `[y_jx, y_jy, c_j]`, added in order.
    ///
    /// The same bits in every variant.
    pub fn add(lanes: &LanePositions, sources: &[[f32; 3]], sums: &mut Repulsion) {
        let ([xs, ys], Repulsion { mut push, mut weight }) = (*lanes, *sums);
        for &[x, y, count] in sources {
            for lane in 0..LANES {
                let (x, y) = (xs[lane] - x, ys[lane] - y);
                let one = 1. / (1. + x * x + y * y);
                let all = count * one;
                weight[lane] += all;
                push[0][lane] += all * one * x;
                push[1][lane] += all * one * y;
            }
        }
        *sums = Repulsion { push, weight };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Variant;

    #[test]
    fn sums_are_those_computed_by_hand_in_every_variant() {
        let mut lanes = [[0.; LANES]; 2];
        lanes[0][1] = 1.;
        lanes[1][15] = -2.;
        let sources = [[1., 0., 1.], [0., 2., 3.]];
        for variant in Variant::available() {
            let mut sums = Repulsion::default();
            add(variant, &lanes, &sources, &mut sums);
            // At (0, 0): weights 1/2 and 1/5.
            assert_eq!(sums.weight[0], 0.5 + 3. / 5., "{variant}");
            let near = |a: f32, b: f32| (a - b).abs() < 1e-6;
            assert!(near(sums.push[0][0], -0.25) && near(sums.push[1][0], -6. / 25.), "{variant}");
            // At (1, 0): 1 and 1/6. At (0, -2): 1/6 and 1/17.
            assert!(near(sums.weight[1], 1.5) && near(sums.push[0][1], 3. / 36.), "{variant}");
            assert!(near(sums.push[1][15], -2. / 36. - 12. / 289.), "{variant}");
        }
    }

    #[test]
    fn variants_and_parts_give_the_same_bits() {
        let draw = |i: usize| ((i * 7919 % 1009) as f32 / 1009. - 0.5) * 40.;
        let lanes = [0, LANES].map(|from| std::array::from_fn(|lane| draw(from + lane)));
        let sources: Vec<[f32; 3]> =
            (40..140).map(|i| [draw(2 * i), draw(2 * i + 1), (i % 5) as f32]).collect();
        let mut want = Repulsion::default();
        add(Variant::PORTABLE, &lanes, &sources, &mut want);
        for variant in Variant::available() {
            let mut sums = Repulsion::default();
            sources.chunks(33).for_each(|part| add(variant, &lanes, part, &mut sums));
            assert_eq!(sums, want, "{variant}");
        }
    }
}
