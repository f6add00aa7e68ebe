//! What the embeddings say about the pictures, whatever their clusters: nearest neighbours, near-duplicates,
//! outliers, and the map ([`Analysis`]); and about clusters: which ones are similar ([`ClusterAnalysis`]).
//!
//! Rows are scaled to unit length, so a similarity is a cosine. Pictures are named by their *place*: the
//! position in the index of the pseudo-labels. Of more than [`MOST`] pictures, a random sample is analysed.

use std::path::Path;

use anyhow::{Result, ensure};
use assignment::{TSne, nearest_neighbours, principal_plane, sample};
use data::{Embeddings, PseudoLabels};
use rayon::prelude::*;
use stage::Interrupt;

use crate::clusters::NO_CLUSTER;

/// Most pictures that are analysed: neighbours are searched among all pairs.
pub const MOST: usize = 100_000;

/// Neighbours of each picture; the map is made of them.
pub const NEIGHBOURS: usize = 15;

/// Near-duplicates are nearer than this share of the median distance to a nearest neighbour.
const DUPLICATE: f64 = 0.2;

/// Most outliers that are listed.
const OUTLIERS: usize = 24;

/// Rows of unit length of the analysed pictures.
#[derive(Debug)]
pub struct UnitRows {
    /// Places of the pictures, ascending, `A`.
    pub places: Vec<u32>,
    /// `(A, width)`; a row that was zero stays zero.
    pub values: Vec<f32>,
    /// Width of an embedding.
    pub width: usize,
}

impl UnitRows {
    /// Reads the embeddings of the pictures of `labels`.
    ///
    /// # Errors
    ///
    /// The file is missing or damaged, or about other pictures.
    pub fn open(path: &Path, labels: &PseudoLabels) -> Result<Self> {
        let embeddings = Embeddings::open(path)?;
        embeddings.data_set.require(&labels.data_set, "give the embeddings that were clustered")?;
        ensure!(
            embeddings.index == labels.index,
            "`{}` and `{}` are about different pictures of one data set; give the embeddings that were \
             clustered",
            path.display(),
            labels.data_set.path.display()
        );
        Ok(Self::of(&embeddings.backbone, embeddings.width))
    }

    /// Scales `rows` `(M, width)`, or a sample of them.
    pub fn of(rows: &[f32], width: usize) -> Self {
        let count = rows.len() / width.max(1);
        let mut random = stage::random::stream(0, "report-sample", &[count as u64]);
        let places: Vec<u32> =
            sample(count, MOST, &mut random).into_iter().map(|place| place as u32).collect();
        let mut values = vec![0f32; places.len() * width];
        let scaled = values.par_chunks_mut(width.max(1)).zip(&places);
        scaled.for_each(|(to, &place)| {
            let row = &rows[place as usize * width..][..width];
            let length = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
            let factor = if length > 1e-12 { 1. / length } else { 0. };
            to.iter_mut().zip(row).for_each(|(to, &x)| *to = (f64::from(x) * factor) as f32);
        });
        Self { places, values, width }
    }

    /// Number of rows, `A`.
    pub fn count(&self) -> usize {
        self.places.len()
    }

    /// A row.
    pub fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.width..][..self.width]
    }

    /// The cosine of two rows.
    fn similarity(&self, i: usize, j: usize) -> f64 {
        product(self.row(i), self.row(j))
    }
}

fn product(x: &[f32], y: &[f32]) -> f64 {
    x.iter().zip(y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum()
}

/// Pictures that are almost the same, by place.
#[derive(Debug, Clone, PartialEq)]
pub struct Duplicates {
    /// The pictures, ascending.
    pub places: Vec<u32>,
    /// The lowest cosine of the pairs that join the group; 1 for equal embeddings.
    pub similarity: f32,
    /// Whether the network sees no difference between them.
    pub is_exact: bool,
}

/// The analysis of `A` pictures. It does not depend on clusters.
#[derive(Debug, PartialEq)]
pub struct Analysis {
    /// Places of the pictures, ascending, `A`.
    pub places: Vec<u32>,
    /// Nearest others of each picture by row of this analysis, `(A, k)`, nearest first.
    pub neighbours: Vec<u32>,
    /// Neighbours of a picture, `k`; [`NEIGHBOURS`], or all others where there are fewer.
    pub each: usize,
    /// Positions on the map, `A`.
    pub map: Vec<[f32; 2]>,
    /// Groups of near-duplicates: exact ones first, then by falling similarity.
    pub duplicates: Vec<Duplicates>,
    /// The cosine above which two pictures are near-duplicates.
    pub duplicate_similarity: f64,
    /// Places of the pictures with the fewest others near, the loneliest first.
    pub outliers: Vec<u32>,
}

impl Analysis {
    /// Analyses pictures.
    ///
    /// # Errors
    ///
    /// A number is not finite, or the program is interrupted.
    pub fn of(rows: &UnitRows, interrupt: &Interrupt) -> Result<Self> {
        let count = rows.count();
        let each = NEIGHBOURS.min(count.saturating_sub(1));
        let neighbours = nearest_neighbours(&rows.values, count, rows.width, each)?;
        interrupt.check()?;
        let start = principal_plane(&rows.values, count, rows.width)?;
        let map = TSne::STANDARD.map(&start, &neighbours, 0, |_| interrupt.check())?;
        let (duplicates, duplicate_similarity) = duplicates(rows, &neighbours, each);
        Ok(Self {
            outliers: outliers(rows, &neighbours, each),
            places: rows.places.clone(),
            neighbours,
            each,
            map,
            duplicates,
            duplicate_similarity,
        })
    }

    /// The row of the picture at a place, if it was analysed.
    pub fn row_of(&self, place: u32) -> Option<usize> {
        self.places.binary_search(&place).ok()
    }

    /// Places of the nearest others of a row, nearest first.
    pub fn near(&self, row: usize) -> impl Iterator<Item = u32> {
        let near = &self.neighbours[row * self.each..][..self.each];
        near.iter().map(|&other| self.places[other as usize])
    }
}

/// What the embeddings say about `K` clusters of `A` analysed pictures.
#[derive(Debug, Default, PartialEq)]
pub struct ClusterAnalysis {
    /// For each cluster the others by index, the one with the most similar mean embedding first.
    pub similar: Vec<Vec<u32>>,
    /// Index of the cluster, other than its own, whose mean embedding is the most similar to each picture, `A`;
    /// [`NO_CLUSTER`] where no other cluster has pictures.
    pub second_best: Vec<u32>,
}

impl ClusterAnalysis {
    /// Analyses clusters.
    ///
    /// - `cluster`: index of the cluster of each picture, by place; from `clusters` on, it is in none.
    /// - `clusters`: number of clusters.
    pub fn of(rows: &UnitRows, cluster: &[u32], clusters: usize) -> Self {
        let own: Vec<u32> = rows.places.iter().map(|&place| cluster[place as usize]).collect();
        let means = cluster_means(rows, &own, clusters);
        let second_best = own.par_iter().enumerate();
        let second_best = second_best.map(|(row, &own)| second_best_of(rows, row, own, &means));
        Self { second_best: second_best.collect(), similar: similar(&means, rows.width) }
    }
}

fn second_best_of(rows: &UnitRows, row: usize, own: u32, means: &[f32]) -> u32 {
    let means = means.chunks(rows.width.max(1)).enumerate();
    let others = means.filter(|&(k, mean)| k != own as usize && mean.iter().any(|&x| x != 0.));
    let others = others.map(|(k, mean)| (product(rows.row(row), mean), k as u32));
    let best = others.reduce(|a, b| if b.0 > a.0 { b } else { a });
    best.map_or(NO_CLUSTER, |(_, k)| k)
}

/// Mean row of each cluster, `(K, width)`, of unit length; zero for an empty cluster.
fn cluster_means(rows: &UnitRows, own: &[u32], clusters: usize) -> Vec<f32> {
    let mut sums = vec![0f64; clusters * rows.width];
    for (i, &k) in own.iter().enumerate().filter(|&(_, &k)| (k as usize) < clusters) {
        let sums = &mut sums[k as usize * rows.width..][..rows.width];
        sums.iter_mut().zip(rows.row(i)).for_each(|(sum, &x)| *sum += f64::from(x));
    }
    let unit = |sums: &[f64]| -> Vec<f32> {
        let length = sums.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
        sums.iter().map(|x| (x / length) as f32).collect()
    };
    sums.chunks(rows.width.max(1)).flat_map(unit).collect()
}

fn similar(means: &[f32], width: usize) -> Vec<Vec<u32>> {
    let means: Vec<&[f32]> = means.chunks(width.max(1)).collect();
    let others = |k: usize| {
        let others = (0..means.len()).filter(|&other| other != k);
        let mut others: Vec<(f64, u32)> =
            others.map(|other| (product(means[k], means[other]), other as u32)).collect();
        others.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        others.into_iter().map(|(_, other)| other).collect()
    };
    (0..means.len()).map(others).collect()
}

/// Joins pairs of neighbours that are far nearer than neighbours usually are. The squared distance of unit
/// rows is `2 − 2 cos`, so the limit of the cosine is `1 − 0.2² (1 − c)`, where `c` is the median cosine of
/// a picture's nearest neighbour among those that are not equal to it.
fn duplicates(rows: &UnitRows, neighbours: &[u32], each: usize) -> (Vec<Duplicates>, f64) {
    if each == 0 {
        return (vec![], 1.);
    }
    let is_equal = |i: usize, j: usize| rows.row(i) == rows.row(j);
    let nearest = |(i, near): (usize, &[u32])| {
        let other = near.iter().find(|&&j| !is_equal(i, j as usize))?;
        Some(rows.similarity(i, *other as usize))
    };
    let mut typical: Vec<f64> =
        neighbours.par_chunks(each).enumerate().filter_map(nearest).collect();
    typical.sort_by(f64::total_cmp);
    let median = typical.get(typical.len() / 2).copied().unwrap_or(1.);
    let limit = 1. - DUPLICATE * DUPLICATE * (1. - median);

    let mut groups = Groups::new(rows.count());
    for (i, near) in neighbours.chunks(each).enumerate() {
        for j in near.iter().map(|&j| j as usize) {
            let is_exact = is_equal(i, j);
            let similarity = if is_exact { 1. } else { rows.similarity(i, j).min(1.) };
            if similarity <= limit && !is_exact {
                break; // The others are farther.
            }
            groups.join(i, j, similarity);
        }
    }
    let group = |(members, similarity): (Vec<usize>, f64)| Duplicates {
        places: members.iter().map(|&i| rows.places[i]).collect(),
        similarity: similarity as f32,
        is_exact: members.windows(2).all(|pair| is_equal(pair[0], pair[1])),
    };
    let mut found: Vec<Duplicates> = groups.of_several().into_iter().map(group).collect();
    found.sort_by(|a, b| {
        let order = b.is_exact.cmp(&a.is_exact).then(b.similarity.total_cmp(&a.similarity));
        order.then(a.places.cmp(&b.places))
    });
    (found, limit)
}

/// The pictures whose farthest of the `k` neighbours is the least similar: Ramaswamy et al. 2000.
fn outliers(rows: &UnitRows, neighbours: &[u32], each: usize) -> Vec<u32> {
    if each == 0 {
        return vec![];
    }
    let farthest =
        |(i, near): (usize, &[u32])| (rows.similarity(i, near[each - 1] as usize), rows.places[i]);
    let mut all: Vec<(f64, u32)> = neighbours.par_chunks(each).enumerate().map(farthest).collect();
    all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    all.into_iter().take(OUTLIERS.min(rows.count() / 10)).map(|(_, place)| place).collect()
}

/// Disjoint groups of numbers, and the lowest similarity that joined each.
struct Groups {
    parents: Vec<usize>,
    /// Of the group whose first number this is.
    similarities: Vec<f64>,
}

impl Groups {
    fn new(count: usize) -> Self {
        Self { parents: (0..count).collect(), similarities: vec![1.; count] }
    }

    fn first(&mut self, mut i: usize) -> usize {
        while self.parents[i] != i {
            self.parents[i] = self.parents[self.parents[i]];
            i = self.parents[i];
        }
        i
    }

    fn join(&mut self, i: usize, j: usize, similarity: f64) {
        let (i, j) = (self.first(i), self.first(j));
        let (first, second) = (i.min(j), i.max(j));
        self.parents[second] = first;
        let both = self.similarities[first].min(self.similarities[second]);
        self.similarities[first] = both.min(similarity);
    }

    /// The groups of at least two numbers, each ascending, with their similarities.
    fn of_several(&mut self) -> Vec<(Vec<usize>, f64)> {
        let mut groups = vec![vec![]; self.parents.len()];
        for i in 0..self.parents.len() {
            let first = self.first(i);
            groups[first].push(i);
        }
        let groups = groups.into_iter().zip(self.similarities.iter().copied());
        groups.filter(|(group, _)| group.len() > 1).collect()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use rand::RngExt;

    use super::*;

    fn draws(seed: u64, count: usize) -> Vec<f32> {
        let mut random = stage::random::stream(seed, "analysis-test", &[]);
        (0..count).map(|_| random.random::<f32>() - 0.5).collect()
    }

    /// Rows around as many directions as there are groups, in turns; the groups.
    pub(crate) fn grouped(n: usize, d: usize, groups: usize, noise: f32) -> (Vec<f32>, Vec<u32>) {
        let (centres, noises) = (draws(1, groups * d), draws(2, n * d));
        let value = |i: usize| centres[i / d % groups * d + i % d] + noise * noises[i];
        ((0..n * d).map(value).collect(), (0..n).map(|i| (i % groups) as u32).collect())
    }

    #[test]
    fn duplicates_are_exact_first_and_outliers_lonely() -> Result<()> {
        let (n, d) = (60, 8);
        let (mut rows, _) = grouped(n, d, 3, 0.3);
        // Pictures 4 and 10 are equal, 7 is almost 1, and 20 is near nothing.
        let (from, to) = (4 * d, 10 * d);
        rows.copy_within(from..from + d, to);
        (0..d).for_each(|a| rows[7 * d + a] = rows[d + a] * 3. + 0.001 * a as f32);
        let lonely: Vec<f32> = rows[..d].iter().map(|x| -x).collect();
        rows[20 * d..21 * d].copy_from_slice(&lonely);
        let found = Analysis::of(&UnitRows::of(&rows, d), &Interrupt::default())?;
        let groups: Vec<(&[u32], bool)> =
            found.duplicates.iter().map(|group| (&group.places[..], group.is_exact)).collect();
        assert_eq!(groups, [(&[4, 10][..], true), (&[1, 7], false)]);
        assert_eq!(found.duplicates[0].similarity, 1.);
        let near = f64::from(found.duplicates[1].similarity);
        assert!(near > found.duplicate_similarity && near < 1., "{near}");
        assert_eq!((found.outliers[0], found.outliers.len()), (20, 6));
        assert_eq!((found.each, found.map.len()), (15, n));
        assert_eq!(found.near(4).next(), Some(10));
        Ok(())
    }

    #[test]
    fn similar_clusters_and_the_second_best_are_by_mean_embedding() {
        // Directions at 0°, 20°, 100°; the fourth cluster is empty.
        let rows: Vec<f32> = [0f32, 1., 20., 21., 100., 101.]
            .iter()
            .flat_map(|angle| [angle.to_radians().cos(), angle.to_radians().sin()])
            .collect();
        let clusters = [0, 0, 1, 1, 2, 2];
        let found = ClusterAnalysis::of(&UnitRows::of(&rows, 2), &clusters, 4);
        assert_eq!(found.second_best, [1, 1, 0, 0, 1, 1]);
        assert_eq!(found.similar[0], [1, 3, 2]);
        assert_eq!(found.similar[2], [1, 3, 0]);
    }

    #[test]
    fn few_pictures_and_zero_rows_are_analysed() -> Result<()> {
        for n in 0..4 {
            let rows = UnitRows::of(&vec![0.; n * 2], 2);
            let found = Analysis::of(&rows, &Interrupt::default())?;
            assert_eq!((found.map.len(), found.each), (n, n.saturating_sub(1)));
            assert_eq!(ClusterAnalysis::of(&rows, &vec![0; n], 1).second_best, vec![NO_CLUSTER; n]);
            assert_eq!(found.duplicates.len(), usize::from(n > 1), "all are equal");
        }
        Ok(())
    }
}
