//! One head, forward and backward: `D → hidden → GELU → bottleneck → unit length → K directions`.
//!
//! `logit_c = g_c · (v_c / ‖v_c‖) · z`, where `z` has unit length: a layer without bias whose weights are
//! normed (Adaloglou et al. 2023). The parameters of a head are one flat list, so that optimizer, moving
//! average and checkpoint treat them alike.

use std::ops::Range;

use anyhow::Result;
use frozen::product::{FlatMatrix, HeadFloat, add_rows};
use rand::RngExt;
use rand_distr::Normal;

/// Extents of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadShape {
    /// Width `D` of an embedding.
    pub width: usize,
    /// Width of the hidden layer.
    pub hidden: usize,
    /// Width of the layer that is scaled to unit length.
    pub bottleneck: usize,
    /// Directions `K`.
    pub clusters: usize,
}

/// The ranges of a head's parameters in their flat list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadPlaces {
    /// `W₁`, `(hidden, D)`.
    pub hidden_weight: Range<usize>,
    /// `b₁`, `(hidden,)`.
    pub hidden_bias: Range<usize>,
    /// `W₂`, `(bottleneck, hidden)`.
    pub bottleneck_weight: Range<usize>,
    /// `b₂`, `(bottleneck,)`.
    pub bottleneck_bias: Range<usize>,
    /// `v`, `(K, bottleneck)`.
    pub directions: Range<usize>,
    /// `g`, `(K,)`.
    pub scales: Range<usize>,
}

impl HeadShape {
    /// The places of the parameters.
    pub fn places(&self) -> HeadPlaces {
        let Self { width, hidden, bottleneck, clusters } = *self;
        let mut end = 0;
        let mut next = |count| {
            end += count;
            end - count..end
        };
        HeadPlaces {
            hidden_weight: next(hidden * width),
            hidden_bias: next(hidden),
            bottleneck_weight: next(bottleneck * hidden),
            bottleneck_bias: next(bottleneck),
            directions: next(clusters * bottleneck),
            scales: next(clusters),
        }
    }

    /// Number of parameters.
    pub fn parameters(&self) -> usize {
        self.places().scales.end
    }

    /// A random head: weights normal with this deviation, biases 0, `v` uniform in `±1/√bottleneck`,
    /// `g` 1.
    ///
    /// `seed` and `number` name the draw, see [`stage::random`].
    pub fn random(&self, deviation: f64, seed: u64, number: u64) -> Vec<f32> {
        let mut random = stage::random::stream(seed, "temi head", &[number]);
        let normal = Normal::new(0., deviation).expect("a checked deviation");
        let bound = 1. / (self.bottleneck as f32).sqrt();
        let places = self.places();
        let mut values = vec![0f32; self.parameters()];
        for weights in [places.hidden_weight, places.bottleneck_weight] {
            values[weights].fill_with(|| random.sample(normal) as f32);
        }
        values[places.directions].fill_with(|| random.random_range(-bound..bound));
        values[places.scales].fill(1.);
        values
    }
}

/// The result of a forward pass of `n` rows, with the values for the backward pass.
#[derive(Debug)]
pub struct HeadPass<T> {
    /// GELU's output and derivative, `(n, hidden)` each.
    activation: Vec<T>,
    slope: Vec<T>,
    /// Unit rows `z`, `(n, bottleneck)`, and their lengths before, `(n,)`.
    unit: Vec<T>,
    length: Vec<T>,
    /// Cosines of rows and directions, `(n, K)`.
    cosines: Vec<T>,
    /// `g` times the cosines, `(n, K)`.
    pub logits: Vec<T>,
}

/// Computes the logits of `rows` `(n, D)`.
///
/// # Errors
///
/// The rows have another width than the head.
pub fn forward<T: HeadFloat>(
    shape: &HeadShape,
    parameters: &[T],
    rows: &FlatMatrix,
) -> Result<HeadPass<T>> {
    let HeadPlaces {
        hidden_weight,
        hidden_bias,
        bottleneck_weight,
        bottleneck_bias,
        directions,
        scales,
    } = shape.places();
    let of = |place: Range<usize>, columns| FlatMatrix::new(&parameters[place], columns);
    let mut activation: Vec<T> = rows.times(&of(hidden_weight, shape.width)?.transposed()?)?;
    let mut slope = vec![T::zero(); activation.len()];
    let bias = &parameters[hidden_bias];
    for (values, slopes) in
        activation.chunks_exact_mut(shape.hidden).zip(slope.chunks_exact_mut(shape.hidden))
    {
        for ((value, slope), &bias) in values.iter_mut().zip(slopes).zip(bias) {
            (*value, *slope) = (*value + bias).gelu();
        }
    }
    let mut unit: Vec<T> = FlatMatrix::new(&activation, shape.hidden)?
        .times(&of(bottleneck_weight, shape.hidden)?.transposed()?)?;
    for row in unit.chunks_exact_mut(shape.bottleneck) {
        row.iter_mut().zip(&parameters[bottleneck_bias.clone()]).for_each(|(x, &b)| *x += b);
    }
    let length = to_unit_length(&mut unit, shape.bottleneck);
    let unit_directions =
        FlatMatrix::new(&unit_directions(shape, &parameters[directions]).0, shape.bottleneck)?;
    let cosines: Vec<T> =
        FlatMatrix::new(&unit, shape.bottleneck)?.times(&unit_directions.transposed()?)?;
    let scales = &parameters[scales];
    let logits = cosines
        .chunks_exact(shape.clusters)
        .flat_map(|row| row.iter().zip(scales).map(|(&cosine, &g)| g * cosine))
        .collect();
    Ok(HeadPass { activation, slope, unit, length, cosines, logits })
}

/// The gradient of every parameter, from that of the logits, `(n, K)`.
///
/// With `u = v/‖v‖`: `∂g_c = Σ_n ∂l_nc cos_nc`, `∂v_c = (I − u uᵀ) g_c Σ_n ∂l_nc z_n / ‖v_c‖`,
/// `∂y = (I − z zᵀ) Σ_c ∂l_c g_c u_c / ‖y‖`; the layers below are linear.
///
/// # Errors
///
/// The rows have another width than the head.
pub fn backward<T: HeadFloat>(
    shape: &HeadShape,
    parameters: &[T],
    rows: &FlatMatrix,
    pass: &HeadPass<T>,
    logits_gradient: &[T],
) -> Result<Vec<T>> {
    let places = shape.places();
    let mut gradient = vec![T::zero(); shape.parameters()];
    let (directions, lengths) = unit_directions(shape, &parameters[places.directions.clone()]);
    let scales = &parameters[places.scales.clone()];

    // The last layer: scales, directions, unit rows.
    let mut scaled = logits_gradient.to_vec();
    for (row, cosines) in
        scaled.chunks_exact_mut(shape.clusters).zip(pass.cosines.chunks_exact(shape.clusters))
    {
        let sums = &mut gradient[places.scales.clone()];
        for (((x, &cosine), &g), sum) in row.iter_mut().zip(cosines).zip(scales).zip(sums) {
            *sum += *x * cosine;
            *x *= g;
        }
    }
    let scaled = FlatMatrix::new(&scaled, shape.clusters)?;
    let unit = FlatMatrix::new(&pass.unit, shape.bottleneck)?;
    let mut of_directions: Vec<T> = scaled.transposed()?.times(&unit)?;
    across(&mut of_directions, &directions, &lengths);
    gradient[places.directions].copy_from_slice(&of_directions);
    let directions = FlatMatrix::new(&directions, shape.bottleneck)?;
    let mut of_rows: Vec<T> = scaled.times(&directions)?;
    across(&mut of_rows, &pass.unit, &pass.length);

    // The bottleneck.
    add_rows(&mut gradient[places.bottleneck_bias], &of_rows);
    let of_rows = FlatMatrix::new(&of_rows, shape.bottleneck)?;
    let activation = FlatMatrix::new(&pass.activation, shape.hidden)?;
    let weight: Vec<T> = of_rows.transposed()?.times(&activation)?;
    gradient[places.bottleneck_weight.clone()].copy_from_slice(&weight);
    let weight = FlatMatrix::new(&parameters[places.bottleneck_weight], shape.hidden)?;
    let mut of_hidden: Vec<T> = of_rows.times(&weight)?;

    // The hidden layer.
    of_hidden.iter_mut().zip(&pass.slope).for_each(|(x, &slope)| *x *= slope);
    add_rows(&mut gradient[places.hidden_bias], &of_hidden);
    let of_hidden = FlatMatrix::new(&of_hidden, shape.hidden)?;
    let weight: Vec<T> = of_hidden.transposed()?.times(rows)?;
    gradient[places.hidden_weight].copy_from_slice(&weight);
    Ok(gradient)
}

/// The directions at unit length, and their lengths before.
fn unit_directions<T: HeadFloat>(shape: &HeadShape, directions: &[T]) -> (Vec<T>, Vec<T>) {
    let mut unit = directions.to_vec();
    let lengths = to_unit_length(&mut unit, shape.bottleneck);
    (unit, lengths)
}

/// `g_c v_c / ‖v_c‖`, `(K, bottleneck)`: the last layer as one matrix.
pub fn effective_directions(shape: &HeadShape, parameters: &[f32]) -> Vec<f32> {
    let places = shape.places();
    let (mut unit, _) = unit_directions(shape, &parameters[places.directions]);
    for (row, &g) in unit.chunks_exact_mut(shape.bottleneck).zip(&parameters[places.scales]) {
        row.iter_mut().for_each(|x| *x *= g);
    }
    unit
}

/// Scales rows to unit length and returns their lengths, at least 1e-12, as in PyTorch's `normalize`.
fn to_unit_length<T: HeadFloat>(rows: &mut [T], width: usize) -> Vec<T> {
    let scale = |row: &mut [T]| {
        let length = row.iter().map(|&x| x * x).sum::<T>().sqrt().at_least(T::of(1e-12));
        row.iter_mut().for_each(|x| *x /= length);
        length
    };
    rows.chunks_exact_mut(width).map(scale).collect()
}

/// Removes the part of each gradient along its unit row, and divides the rest by the row's former length.
fn across<T: HeadFloat>(gradient: &mut [T], unit: &[T], lengths: &[T]) {
    let width = unit.len() / lengths.len().max(1);
    let rows = gradient.chunks_exact_mut(width).zip(unit.chunks_exact(width));
    for ((gradient, unit), &length) in rows.zip(lengths) {
        let along = gradient.iter().zip(unit).map(|(&d, &u)| d * u).sum::<T>();
        gradient.iter_mut().zip(unit).for_each(|(d, &u)| *d = (*d - along * u) / length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::loss::tests::assert_near;

    const SHAPE: HeadShape = HeadShape { width: 4, hidden: 5, bottleneck: 3, clusters: 6 };

    fn parameters(shape: &HeadShape) -> Vec<f64> {
        let mut values: Vec<f64> = shape.random(0.5, 3, 0).into_iter().map(f64::from).collect();
        let places = shape.places();
        for (i, place) in
            [places.hidden_bias, places.bottleneck_bias, places.scales].into_iter().enumerate()
        {
            for (j, value) in values[place].iter_mut().enumerate() {
                *value += 0.1 * (i + j) as f64 - 0.15;
            }
        }
        values
    }

    fn rows() -> FlatMatrix {
        let values: Vec<f64> = (0..28).map(|i| f64::from(i * 37 % 23) / 11. - 1.).collect();
        FlatMatrix::new(&values, 4).expect("seven rows")
    }

    /// T4: only the last layer. The hidden layers pass (3, 4) on: with a large bias of the hidden layer
    /// GELU is the identity.
    #[test]
    fn the_last_layer_has_the_specified_values() -> Result<()> {
        let shape = HeadShape { width: 1, hidden: 1, bottleneck: 2, clusters: 3 };
        // GELU(40) is 40 exactly; 40 · (.075, .1) is (3, 4).
        let parameters =
            [0., 40., 0.075, 0.1, 0., 0., 2., 0., 0., 0.5, -3., 4., 1., 1., 2.].to_vec();
        let rows = FlatMatrix::new(&[1f64], 1)?;
        let pass = forward(&shape, &parameters, &rows)?;
        assert_near(&pass.logits, &[0.6, 0.8, 0.56], 1e-12);
        let gradient = backward(&shape, &parameters, &rows, &pass, &[1., 2., -1.])?;
        let places = shape.places();
        let directions = &gradient[places.directions.clone()];
        assert_near(directions, &[0., 0.4, 2.4, 0., -0.3072, -0.2304], 1e-12);
        assert_near(&gradient[places.scales], &[0.6, 1.6, -0.28], 1e-12);
        for (d, v) in directions.chunks(2).zip(parameters[places.directions].chunks(2)) {
            assert!((d[0] * v[0] + d[1] * v[1]).abs() < 1e-12, "orthogonal to v");
        }
        Ok(())
    }

    #[test]
    fn every_gradient_matches_central_differences() -> Result<()> {
        let (parameters, rows) = (parameters(&SHAPE), rows());
        // A sum with a weight for each logit.
        let weights: Vec<f64> = (0..42).map(|i| f64::from(i * 29 % 17) / 8. - 1.).collect();
        let value = |parameters: &[f64]| -> Result<f64> {
            let logits = forward(&SHAPE, parameters, &rows)?.logits;
            Ok(logits.iter().zip(&weights).map(|(l, w)| l * w).sum())
        };
        let pass = forward(&SHAPE, &parameters, &rows)?;
        let gradient = backward(&SHAPE, &parameters, &rows, &pass, &weights)?;
        assert_eq!(gradient.len(), SHAPE.parameters());
        for i in 0..gradient.len() {
            let (mut up, mut down) = (parameters.clone(), parameters.clone());
            up[i] += 1e-6;
            down[i] -= 1e-6;
            let want = (value(&up)? - value(&down)?) / 2e-6;
            assert!((gradient[i] - want).abs() < 1e-7, "{i}: {}, want {want}", gradient[i]);
        }
        Ok(())
    }

    #[test]
    fn both_number_types_agree() -> Result<()> {
        let wide = parameters(&SHAPE);
        let narrow: Vec<f32> = wide.iter().map(|&x| x as f32).collect();
        let values: Vec<f32> = (0..28).map(|i| i as f32 * 0.1 - 1.4).collect();
        let as_wide: Vec<f64> = values.iter().map(|&x| f64::from(x)).collect();
        let got = forward(&SHAPE, &narrow, &FlatMatrix::new(&values, 4)?)?.logits;
        let want = forward(&SHAPE, &wide, &FlatMatrix::new(&as_wide, 4)?)?.logits;
        let got: Vec<f64> = got.into_iter().map(f64::from).collect();
        assert_near(&got, &want, 2e-6);
        Ok(())
    }

    #[test]
    fn random_heads_have_the_specified_distributions() {
        let shape = HeadShape { width: 384, hidden: 512, bottleneck: 256, clusters: 10 };
        assert_eq!(shape.parameters(), 331_018, "d = 384, K = 10 of the specification");
        let shape = HeadShape { width: 40, hidden: 50, ..shape };
        let (values, places) = (shape.random(0.02, 1, 0), shape.places());
        let weights = &values[places.bottleneck_weight];
        let squares: f32 = weights.iter().map(|x| x * x).sum();
        assert!((squares / weights.len() as f32 - 4e-4).abs() < 2e-5, "{squares}");
        assert!(values[places.directions].iter().all(|x| x.abs() <= 1. / 16.));
        assert!(values[places.scales].iter().all(|&g| g == 1.));
        assert!(values[places.hidden_bias].iter().all(|&b| b == 0.));
        assert_ne!(values[places.hidden_weight], shape.random(0.02, 1, 1)[..2000]);
    }
}
