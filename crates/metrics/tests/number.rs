//! The number of clusters that is suggested for made-up features whose classes are known.

use anyhow::Result;
use assignment::number::{Estimator, EstimatorSettings, Suggestion, suggested};
use assignment::{Generalisation, neighbour_graph_eigenvalues};
use fixture::features::{MadeFeatures, arcs, blobs, nuisance};

const SETTINGS: EstimatorSettings = EstimatorSettings {
    images: 1000,
    measured_images: 600,
    restarts: 3,
    rough_restarts: 2,
    pairs: 3,
    references: 2,
    neighbours: 10,
    most_clusters: 20,
    generalisation: Generalisation { folds: 3, weight: 1., iterations: 20 },
};

fn suggestion(made: &MadeFeatures) -> Result<Suggestion> {
    let estimator = Estimator::new(&made.rows, made.width, &SETTINGS, 0)?;
    let mut candidates = vec![];
    for clusters in 2..=SETTINGS.most_clusters {
        let one = estimator.score(clusters)?;
        println!(
            "{clusters:3} silhouette {:.3} stability {:.3} strength {:.3} gap {:.3} eigengap {:.3} \
             generalisation {:.3}",
            one.silhouette,
            one.stability,
            one.prediction_strength,
            one.gap,
            one.eigengap,
            one.generalisation
        );
        candidates.push(one);
    }
    let found = suggested(&candidates).expect("some structure");
    println!("of {} classes: {found:?}", made.class_count);
    Ok(found)
}

#[test]
fn round_clusters_of_unequal_size_are_counted() -> Result<()> {
    for (sizes, noise) in [
        (&[300, 200, 150, 100, 100, 60, 50, 40][..], 0.1),
        (&[100; 10][..], 0.12),
        (&[250, 250, 250, 250][..], 0.15),
    ] {
        let found = suggestion(&blobs(sizes, noise, 1))?;
        assert_eq!(found.clusters, sizes.len(), "{found:?}");
    }
    Ok(())
}

/// Ten classes in groups: three of three, and one alone.
#[test]
fn classes_in_groups_are_counted() -> Result<()> {
    let groups = blobs(&[300, 300, 300, 100], 0., 2);
    let mut made = blobs(&[100; 10], 0.08, 3);
    // Class k lies around the mean of group k / 3, at a shorter distance than groups from each other.
    let group_mean = |group: u32| {
        let i = groups.classes.iter().position(|&class| class == group).expect("a member");
        groups.rows[i * groups.width..][..groups.width].to_vec()
    };
    let width = made.width;
    for (row, &class) in made.rows.chunks_mut(width).zip(&made.classes) {
        let mean = group_mean(class / 3);
        row.iter_mut().zip(mean).for_each(|(x, m)| *x = 0.6 * *x + m);
    }
    let found = suggestion(&made)?;
    assert_eq!(found.clusters, 10, "{found:?}");
    Ok(())
}

#[test]
fn classes_under_shared_factors_are_counted() -> Result<()> {
    let found = suggestion(&nuisance(1000, 10, 6, 0.2, 0))?;
    assert_eq!(found.clusters, 10, "{found:?}");
    Ok(())
}

/// k-means cuts arcs, so that the suggestion is above 5 here; the graph of neighbours follows them.
#[test]
fn the_graph_of_neighbours_has_a_part_for_each_arc() -> Result<()> {
    let made = arcs(600, 5, 0);
    let mut unit = made.rows.clone();
    for row in unit.chunks_mut(made.width) {
        let length = row.iter().map(|x| x * x).sum::<f32>().sqrt();
        row.iter_mut().for_each(|x| *x /= length);
    }
    let found = neighbour_graph_eigenvalues(&unit, 600, made.width, 10, 6)?;
    assert!(found[4] < 1e-6 && found[5] > 1e-3, "{found:?}");
    Ok(())
}
