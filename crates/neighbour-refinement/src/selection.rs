//! What the label pass finds: pseudo-labels, the images whose labels are trained on, and the neighbours
//! that an image is drawn to.
//!
//! Lists of neighbours are `(N, k)` row by row, nearest first, without the image itself: with it, an image
//! would always agree with one of its neighbours.

use anyhow::{Result, ensure};
use assignment::prototypes;

/// Marks a missing neighbour in a list of fixed length.
pub const NO_NEIGHBOUR: u32 = u32::MAX;

/// The mean memberships of each image and its nearest neighbours,
/// `p̄ᵢ = (pᵢ + Σⱼ pⱼ) / (s + 1)`, `(N, K)`.
///
/// Smoothing removes nearly all errors of labels that are independent of each other, and none of
/// those that neighbours share.
///
/// - `memberships`: `p`, `(N, K)`.
/// - `neighbours`: `(N, k)`.
/// - `count`: `s`, the number of neighbours that are averaged; at most `k`.
///
/// ```
/// // Two images that disagree, and have each other as neighbours.
/// let memberships = [1., 0., 0., 1.];
/// let smoothed = neighbour_refinement::selection::smoothed(&memberships, 2, &[1, 0], 1);
/// assert_eq!(smoothed, [0.5; 4]);
/// ```
pub fn smoothed(
    memberships: &[f32],
    clusters: usize,
    neighbours: &[u32],
    count: usize,
) -> Vec<f64> {
    let images = memberships.len() / clusters;
    let each = neighbours.len() / images.max(1);
    let mut smoothed = vec![0f64; memberships.len()];
    for (i, mean) in smoothed.chunks_exact_mut(clusters).enumerate() {
        let nearest = &neighbours[i * each..][..count.min(each)];
        for &j in [i as u32].iter().chain(nearest) {
            let row = &memberships[j as usize * clusters..][..clusters];
            mean.iter_mut().zip(row).for_each(|(sum, &p)| *sum += f64::from(p));
        }
        mean.iter_mut().for_each(|sum| *sum /= (nearest.len() + 1) as f64);
    }
    smoothed
}

/// The cluster of the largest membership, the lowest of equals, `(N,)`.
pub fn labels(memberships: &[f64], clusters: usize) -> Vec<u32> {
    let largest = |row: &[f64]| {
        let better = |best: usize, k: usize| if row[k] > row[best] { k } else { best };
        (0..clusters).fold(0, better) as u32
    };
    memberships.chunks_exact(clusters).map(largest).collect()
}

/// Marks the reliable images, `(N,)`: of each cluster a share that follows its mean confidence.
///
/// Candidates are the images of a cluster on which enough of the clustering networks agree. The
/// `n = min(count, ⌊N/K⌋)` of largest membership are considered, in order of it and then of the image;
/// with their mean membership `c̄` the first `⌊c̄ n⌋` are reliable. So no cluster has more than its even
/// share, and there is no threshold: unsure clusters have few. The share by confidence is that of CDC (Jia
/// et al. 2025, arXiv:2403.02998); cluster by cluster and from smoothed memberships it is our choice.
///
/// - `memberships`: smoothed, `(N, K)`.
/// - `labels`: the cluster of each image, `(N,)`.
/// - `agreement`: share of the clustering networks that agree, `(N,)`.
/// - `least_agreement`: of a candidate; rounding errors are allowed for.
pub fn reliable(
    memberships: &[f64],
    labels: &[u32],
    clusters: usize,
    agreement: &[f32],
    least_agreement: f64,
) -> Vec<bool> {
    let mut reliable = vec![false; labels.len()];
    for cluster in 0..clusters {
        let confidence = |&i: &usize| memberships[i * clusters + cluster];
        let is_candidate = |&i: &usize| {
            labels[i] as usize == cluster && f64::from(agreement[i]) >= least_agreement - ROUNDING
        };
        let mut candidates: Vec<usize> = (0..labels.len()).filter(is_candidate).collect();
        // Stable: equal ones stay in the order of the images.
        candidates.sort_by(|a, b| confidence(b).total_cmp(&confidence(a)));
        candidates.truncate(labels.len() / clusters);
        // The sum is the mean times the count.
        let kept = candidates.iter().map(confidence).sum::<f64>() + ROUNDING;
        candidates.iter().take(kept as usize).for_each(|&i| reliable[i] = true);
    }
    reliable
}

/// Of shares and memberships, which were computed in f32.
const ROUNDING: f64 = 1e-6;

/// Marks the images that are not at the border between clusters, `(N,)`: a share of all, those of
/// smallest `ρᵢ = ‖zᵢ − c_y‖ / min_{k≠y} ‖zᵢ − c_k‖`.
///
/// Centres are `c_k`, the unit-length mean of the cluster's projections. This is the boundary filter of
/// CoNR (Yu et al. 2023, arXiv:2312.07806), but for two choices of ours: the image at the limit is kept,
/// so that a share of 1 keeps all, and a filtered image learns as in BYOL, where CoNR leaves it out.
///
/// - `projections`: `z`, of unit length, `(N, P)`.
/// - `labels`: the cluster of each image, `(N,)`.
/// - `share`: θ, of the images that are kept, in `(0, 1]`.
///
/// All are kept with fewer than two clusters that have an image.
///
/// # Errors
///
/// The lengths contradict each other.
pub fn central(
    projections: &[f32],
    width: usize,
    labels: &[u32],
    clusters: usize,
    share: f64,
) -> Result<Vec<bool>> {
    let mut present = vec![false; clusters];
    labels.iter().for_each(|&label| present[label as usize] = true);
    if share >= 1. || present.iter().filter(|&&present| present).count() < 2 {
        return Ok(vec![true; labels.len()]);
    }
    let centres = prototypes(projections, width, labels, &vec![1.; labels.len()], clusters)?;
    let ratios: Vec<f64> = projections
        .chunks_exact(width)
        .zip(labels)
        .map(|(row, &label)| {
            let others = (0..clusters).filter(|&k| k != label as usize && present[k]);
            let nearest = others
                .map(|k| distance(row, &centres[k * width..][..width]))
                .fold(f64::INFINITY, f64::min);
            let own = distance(row, &centres[label as usize * width..][..width]);
            // At the centre of another cluster it cannot be less central.
            if nearest > 0. { own / nearest } else { f64::INFINITY }
        })
        .collect();
    let mut sorted = ratios.clone();
    sorted.sort_by(f64::total_cmp);
    let kept = (share * labels.len() as f64 - 1e-9).ceil().max(1.) as usize;
    let limit = sorted[kept - 1];
    Ok(ratios.iter().map(|&ratio| ratio <= limit).collect())
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    let squares = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).powi(2));
    squares.sum::<f64>().sqrt()
}

/// The nearest neighbours of each image that have it among their own, `(N, m)`: at most `m` of them,
/// nearest first, then [`NO_NEIGHBOUR`].
///
/// - `neighbours`: `(N, k)`.
///
/// # Errors
///
/// `neighbours` is not `N` lists of one length.
pub fn mutual(neighbours: &[u32], images: usize, most: usize) -> Result<Vec<u32>> {
    ensure!(
        images > 0 && neighbours.len().is_multiple_of(images),
        "mutual: {} neighbours of {images} images",
        neighbours.len()
    );
    let each = neighbours.len() / images;
    let of = |i: usize| &neighbours[i * each..][..each];
    let mut mutual = vec![NO_NEIGHBOUR; images * most];
    for (i, found) in mutual.chunks_exact_mut(most).enumerate() {
        let both = of(i).iter().filter(|&&j| of(j as usize).contains(&(i as u32)));
        found.iter_mut().zip(both).for_each(|(place, &j)| *place = j);
    }
    Ok(mutual)
}

#[cfg(test)]
mod tests {
    use assignment::{chance_corrected_agreement, nearest_neighbours};
    use rand::RngExt;
    use rand_distr::{Distribution, StandardNormal};

    use super::*;

    /// Memberships of two clusters from those of the first.
    fn of_first(first: &[f32]) -> Vec<f32> {
        first.iter().flat_map(|&p| [p, 1. - p]).collect()
    }

    const FIRST: [f32; 8] = [0.9, 0.8, 0.7, 0.6, 0.45, 0.3, 0.2, 0.05];
    const NEIGHBOURS: [u32; 16] = [1, 2, 0, 2, 1, 3, 2, 4, 3, 5, 6, 7, 5, 7, 5, 6];

    fn kept(memberships: &[f64], agreement: &[f32; 8]) -> Vec<usize> {
        let labels = labels(memberships, 2);
        let reliable = reliable(memberships, &labels, 2, agreement, 2. / 3.);
        (0..8).filter(|&i| reliable[i]).collect()
    }

    /// Refinement, case 1.
    #[test]
    fn memberships_are_averaged_with_those_of_the_neighbours() {
        let found = smoothed(&of_first(&FIRST), 2, &NEIGHBOURS, 2);
        let want = [0.8, 0.8, 0.7, 0.583333, 0.45, 0.183333, 0.183333, 0.183333];
        for (row, want) in found.chunks_exact(2).zip(want) {
            assert!((row[0] - want).abs() < 1e-6 && (row[1] - 1. + want).abs() < 1e-6, "{row:?}");
        }
        assert_eq!(labels(&found, 2), [0, 0, 0, 0, 1, 1, 1, 1]);
        let alone = smoothed(&of_first(&FIRST), 2, &NEIGHBOURS, 0);
        assert!(alone.chunks_exact(2).zip(FIRST).all(|(row, p)| row[0] == f64::from(p)));
        let one = smoothed(&of_first(&FIRST), 2, &NEIGHBOURS, 1);
        assert!((one[0] - 0.85).abs() < 1e-6);
    }

    /// Refinement, case 2.
    #[test]
    fn clusters_have_as_many_reliable_images_as_their_confidence_allows() {
        let found = smoothed(&of_first(&FIRST), 2, &NEIGHBOURS, 2);
        assert_eq!(kept(&found, &[1.; 8]), [0, 1, 5, 6, 7]);
        let third = 1. / 3.;
        let agreement = [1., 1., 1., 2. * third, third, 1., third, 1.];
        assert_eq!(kept(&found, &agreement), [0, 1, 5]);
        let swapped: Vec<f64> = found.chunks_exact(2).flat_map(|row| [row[1], row[0]]).collect();
        assert_eq!(kept(&swapped, &[1.; 8]), [0, 1, 5, 6, 7], "names mean nothing");

        let certain =
            |first: [f64; 8]| -> Vec<f64> { first.into_iter().flat_map(|p| [p, 1. - p]).collect() };
        let halves = certain([1., 1., 1., 1., 0., 0., 0., 0.]);
        assert_eq!(kept(&halves, &[1.; 8]), [0, 1, 2, 3, 4, 5, 6, 7]);
        let uneven = certain([1., 1., 1., 1., 1., 0., 0., 0.]);
        assert_eq!(kept(&uneven, &[1.; 8]), [0, 1, 2, 3, 5, 6, 7]);
        assert_eq!(kept(&certain([0.5; 8]), &[1.; 8]), [0, 1]);
        assert_eq!(kept(&certain([1.; 8]), &[1.; 8]), [0, 1, 2, 3], "no more than an even share");
        assert!(kept(&found, &[0.; 8]).is_empty());
    }

    /// The unit vectors of refinement, case 6.
    fn directions() -> Vec<f32> {
        [0f64, 18., 40., 63., 110., 117.]
            .iter()
            .flat_map(|degrees| [degrees.to_radians().cos(), degrees.to_radians().sin()])
            .map(|x| x as f32)
            .collect()
    }

    /// Refinement, case 7: `ρ` is .311, .143, .143, .663, .048, .044.
    #[test]
    fn images_at_the_borders_of_clusters_are_found() -> Result<()> {
        let labels = [0, 0, 0, 0, 1, 1];
        for (share, want) in [
            (0.1, [false, false, false, false, false, true]),
            (0.5, [false, true, false, false, true, true]),
            (0.8, [true, true, true, false, true, true]),
            (0.9, [true; 6]),
            (1., [true; 6]),
        ] {
            assert_eq!(central(&directions(), 2, &labels, 2, share)?, want, "{share}");
        }
        // One cluster has no border, whatever its number.
        assert_eq!(central(&directions(), 2, &[1; 6], 3, 0.5)?, [true; 6]);
        // A third, empty cluster is near nobody.
        let want = [false, true, false, false, true, true];
        assert_eq!(central(&directions(), 2, &labels, 3, 0.5)?, want);
        Ok(())
    }

    #[test]
    fn neighbours_are_mutual_and_the_nearest_come_first() -> Result<()> {
        // 0 and 1 have each other, 2 has both and nobody has it, 3 and 0 have each other.
        let neighbours = [3, 1, 0, 3, 0, 1, 0, 2];
        let none = NO_NEIGHBOUR;
        assert_eq!(mutual(&neighbours, 4, 2)?, [3, 1, 0, none, none, none, 0, none]);
        assert_eq!(mutual(&neighbours, 4, 1)?, [3, 0, none, 0]);
        assert!(mutual(&neighbours[..7], 4, 1).is_err());
        Ok(())
    }

    const IMAGES: usize = 2000;
    const CLUSTERS: usize = 10;
    const WIDTH: usize = 16;

    /// Points of ten classes, each of a larger and a smaller mode: points, class, whether of the smaller
    /// mode.
    fn two_modes() -> (Vec<f32>, Vec<u32>, Vec<bool>) {
        let mut random = stage::random::stream(5, "two modes", &[]);
        let normal = |random: &mut _| -> f64 { StandardNormal.sample(random) };
        let directions: Vec<Vec<f64>> = (0..CLUSTERS)
            .map(|_| {
                let u: Vec<f64> = (0..WIDTH).map(|_| normal(&mut random)).collect();
                let length = u.iter().map(|x| x * x).sum::<f64>().sqrt();
                u.into_iter().map(|x| x / length).collect()
            })
            .collect();
        let (mut points, mut classes, mut smaller) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..IMAGES {
            let (class, is_smaller) = (i % CLUSTERS, (i / CLUSTERS) % 5 < 2);
            let sign = if is_smaller { -0.55 } else { 0.55 };
            let row: Vec<f64> = (0..WIDTH)
                .map(|d| {
                    let centre = f64::from(u8::from(d == class));
                    centre + sign * directions[class][d] + 0.15 * normal(&mut random)
                })
                .collect();
            let length = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            points.extend(row.iter().map(|x| (x / length) as f32));
            classes.push(class as u32);
            smaller.push(is_smaller);
        }
        (points, classes, smaller)
    }

    /// Accuracy of labels before and after smoothing, and of the selected ones; and `κ` before.
    fn after_selection(points: &[f32], classes: &[u32], moved: &[u32]) -> Result<[f64; 4]> {
        let neighbours = nearest_neighbours(points, IMAGES, WIDTH, 10)?;
        let mut memberships = vec![0f32; IMAGES * CLUSTERS];
        for (row, &label) in memberships.chunks_exact_mut(CLUSTERS).zip(moved) {
            row[label as usize] = 1.;
        }
        let smoothed = smoothed(&memberships, CLUSTERS, &neighbours, 10);
        let labels = labels(&smoothed, CLUSTERS);
        let reliable = reliable(&smoothed, &labels, CLUSTERS, &[1.; IMAGES], 2. / 3.);
        let accuracy = |labels: &[u32], of: &dyn Fn(usize) -> bool| {
            let chosen = (0..IMAGES).filter(|&i| of(i));
            let right = chosen.clone().filter(|&i| labels[i] == classes[i]).count();
            right as f64 / chosen.count() as f64
        };
        Ok([
            accuracy(moved, &|_| true),
            accuracy(&labels, &|_| true),
            accuracy(&labels, &|i| reliable[i]),
            chance_corrected_agreement(moved, &neighbours, CLUSTERS)?,
        ])
    }

    /// Refinement, case 12.
    #[test]
    fn smoothing_corrects_independent_errors_and_no_filter_sees_coherent_ones() -> Result<()> {
        let (points, classes, smaller) = two_modes();
        let next = |class: u32, by: u32| (class + by) % CLUSTERS as u32;
        let mut random = stage::random::stream(6, "two modes", &[]);
        let mut other = |class: u32| match random.random_bool(0.4) {
            true => next(class, random.random_range(1..CLUSTERS as u32)),
            false => class,
        };
        let independent: Vec<u32> = classes.iter().map(|&class| other(class)).collect();
        let [before, after, selected, agreement] =
            after_selection(&points, &classes, &independent)?;
        assert!((0.57..0.65).contains(&before), "{before}");
        assert!(after >= 0.97 && selected >= 0.995, "{before} {after} {selected}");
        assert!((0.25..0.4).contains(&agreement), "{agreement}");

        let of_mode = |(&class, &smaller): (&u32, &bool)| next(class, u32::from(smaller));
        let coherent: Vec<u32> = classes.iter().zip(&smaller).map(of_mode).collect();
        let [before, after, selected, agreement] = after_selection(&points, &classes, &coherent)?;
        assert!((0.57..0.65).contains(&before), "{before}");
        assert!((after - before).abs() < 0.03 && (selected - before).abs() < 0.03, "{selected}");
        assert!(agreement > 0.95, "wrong, and confident of it: {agreement}");
        Ok(())
    }
}
