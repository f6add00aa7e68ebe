//! One head, forward and backward: `D → hidden → GELU → bottleneck → unit length → K directions`.
//!
//! `logit_c = g_c · (v_c / ‖v_c‖) · z`, where `z` has unit length: a layer without bias whose weights are
//! normed (Adaloglou et al. 2023). The parameters of a head are one flat list, so that optimizer, moving
//! average and checkpoint treat them alike.

use std::ops::Range;

use anyhow::Result;
use frozen::product::{FlatMatrix, HeadFloat, add_rows, dot};
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

/// A forward pass of `n` rows, with the values for the backward pass, and the backward pass. Its memory
/// serves any number of passes, of any heads.
#[derive(Debug, Default)]
pub struct HeadPass<T> {
    /// GELU's output and derivative, `(n, hidden)` each.
    activation: Vec<T>,
    slope: Vec<T>,
    /// Unit rows `z`, `(n, bottleneck)`, and their lengths before, `(n,)`.
    unit: Vec<T>,
    length: Vec<T>,
    /// Directions `u = v/‖v‖`, `(K, bottleneck)`, and the lengths of `v`, `(K,)`.
    directions: Vec<T>,
    direction_lengths: Vec<T>,
    /// Cosines of rows and directions, `(n, K)`.
    cosines: Vec<T>,
    /// `g` times the cosines, `(n, K)`.
    pub logits: Vec<T>,
    /// The gradient of every parameter, see [`HeadShape::places`].
    pub gradient: Vec<T>,
    /// The gradients of the bottleneck and of the hidden layer, `(n, bottleneck)` and `(n, hidden)`.
    by_unit: Vec<T>,
    by_hidden: Vec<T>,
}

impl<T: HeadFloat> HeadPass<T> {
    /// Computes the logits of `rows` `(n, D)`.
    ///
    /// # Errors
    ///
    /// The rows have another width than the head.
    pub fn forward(
        &mut self,
        shape: &HeadShape,
        parameters: &[T],
        rows: FlatMatrix<T>,
    ) -> Result<()> {
        let HeadShape { hidden, bottleneck, clusters, width } = *shape;
        let places = shape.places();
        let layer = |place: Range<usize>, columns| FlatMatrix::new(&parameters[place], columns);
        let n = rows.rows();
        self.activation.resize(n * hidden, T::zero());
        rows.multiply(layer(places.hidden_weight, width)?.transposed(), &mut self.activation)?;
        self.slope.resize(n * hidden, T::zero());
        let bias = &parameters[places.hidden_bias];
        let both =
            self.activation.chunks_exact_mut(hidden).zip(self.slope.chunks_exact_mut(hidden));
        for (values, slopes) in both {
            for ((value, slope), &bias) in values.iter_mut().zip(slopes).zip(bias) {
                (*value, *slope) = (*value + bias).gelu();
            }
        }

        self.unit.resize(n * bottleneck, T::zero());
        let weight = layer(places.bottleneck_weight, hidden)?.transposed();
        FlatMatrix::new(&self.activation, hidden)?.multiply(weight, &mut self.unit)?;
        let bias = &parameters[places.bottleneck_bias];
        for row in self.unit.chunks_exact_mut(bottleneck) {
            row.iter_mut().zip(bias).for_each(|(x, &b)| *x += b);
        }
        to_unit_length(&mut self.unit, bottleneck, &mut self.length);

        self.directions.clear();
        self.directions.extend_from_slice(&parameters[places.directions]);
        to_unit_length(&mut self.directions, bottleneck, &mut self.direction_lengths);
        self.cosines.resize(n * clusters, T::zero());
        let directions = FlatMatrix::new(&self.directions, bottleneck)?.transposed();
        FlatMatrix::new(&self.unit, bottleneck)?.multiply(directions, &mut self.cosines)?;
        self.logits.clear();
        for row in self.cosines.chunks_exact(clusters) {
            let scales = &parameters[places.scales.clone()];
            self.logits.extend(row.iter().zip(scales).map(|(&cosine, &g)| g * cosine));
        }
        Ok(())
    }

    /// Computes [`HeadPass::gradient`] from that of the logits, `(n, K)`, after a forward pass of the same
    /// parameters and rows.
    ///
    /// With `u = v/‖v‖`: `∂g_c = Σ_n ∂l_nc cos_nc`, `∂v_c = (I − u uᵀ) g_c Σ_n ∂l_nc z_n / ‖v_c‖`,
    /// `∂y = (I − z zᵀ) Σ_c ∂l_c g_c u_c / ‖y‖`; the layers below are linear.
    ///
    /// # Errors
    ///
    /// The rows have another width than the head.
    pub fn backward(
        &mut self,
        shape: &HeadShape,
        parameters: &[T],
        rows: FlatMatrix<T>,
        mut by_logits: Vec<T>,
    ) -> Result<()> {
        let HeadShape { hidden, bottleneck, clusters, .. } = *shape;
        let places = shape.places();
        let n = rows.rows();
        self.gradient.clear();
        self.gradient.resize(shape.parameters(), T::zero());
        let gradient = &mut self.gradient;

        // The last layer: scales, directions, unit rows.
        let scales = &parameters[places.scales.clone()];
        for (row, cosines) in
            by_logits.chunks_exact_mut(clusters).zip(self.cosines.chunks_exact(clusters))
        {
            let sums = &mut gradient[places.scales.clone()];
            for (((x, &cosine), &g), sum) in row.iter_mut().zip(cosines).zip(scales).zip(sums) {
                *sum += *x * cosine;
                *x *= g;
            }
        }
        let scaled = FlatMatrix::new(&by_logits, clusters)?;
        let by_directions = &mut gradient[places.directions];
        let unit = FlatMatrix::new(&self.unit, bottleneck)?;
        scaled.transposed().multiply(unit, by_directions)?;
        across(by_directions, &self.directions, &self.direction_lengths);
        self.by_unit.resize(n * bottleneck, T::zero());
        let directions = FlatMatrix::new(&self.directions, bottleneck)?;
        scaled.multiply(directions, &mut self.by_unit)?;
        across(&mut self.by_unit, &self.unit, &self.length);

        // The bottleneck.
        add_rows(&mut gradient[places.bottleneck_bias], &self.by_unit);
        let by_unit = FlatMatrix::new(&self.by_unit, bottleneck)?;
        let activation = FlatMatrix::new(&self.activation, hidden)?;
        let weight = places.bottleneck_weight;
        by_unit.transposed().multiply(activation, &mut gradient[weight.clone()])?;
        self.by_hidden.resize(n * hidden, T::zero());
        let weight = FlatMatrix::new(&parameters[weight], hidden)?;
        by_unit.multiply(weight, &mut self.by_hidden)?;

        // The hidden layer.
        self.by_hidden.iter_mut().zip(&self.slope).for_each(|(x, &slope)| *x *= slope);
        add_rows(&mut gradient[places.hidden_bias], &self.by_hidden);
        let by_hidden = FlatMatrix::new(&self.by_hidden, hidden)?;
        by_hidden.transposed().multiply(rows, &mut gradient[places.hidden_weight])
    }
}

/// `g_c v_c / ‖v_c‖`, `(K, bottleneck)`: the last layer as one matrix.
pub fn effective_directions(shape: &HeadShape, parameters: &[f32]) -> Vec<f32> {
    let places = shape.places();
    let mut unit = parameters[places.directions].to_vec();
    to_unit_length(&mut unit, shape.bottleneck, &mut vec![]);
    for (row, &g) in unit.chunks_exact_mut(shape.bottleneck).zip(&parameters[places.scales]) {
        row.iter_mut().for_each(|x| *x *= g);
    }
    unit
}

/// Scales rows to unit length and notes their lengths, at least 1e-12, as in PyTorch's `normalize`.
fn to_unit_length<T: HeadFloat>(rows: &mut [T], width: usize, lengths: &mut Vec<T>) {
    lengths.clear();
    for row in rows.chunks_exact_mut(width) {
        let length = dot(row, row).sqrt().at_least(T::of(1e-12));
        let factor = T::one() / length;
        row.iter_mut().for_each(|x| *x *= factor);
        lengths.push(length);
    }
}

/// Removes the part of each gradient along its unit row, and divides the rest by the row's former length.
fn across<T: HeadFloat>(gradient: &mut [T], unit: &[T], lengths: &[T]) {
    let width = unit.len() / lengths.len().max(1);
    let rows = gradient.chunks_exact_mut(width).zip(unit.chunks_exact(width));
    for ((gradient, unit), &length) in rows.zip(lengths) {
        let (along, factor) = (dot(gradient, unit), T::one() / length);
        gradient.iter_mut().zip(unit).for_each(|(d, &u)| *d = (*d - along * u) * factor);
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

    /// Seven rows.
    fn rows() -> Vec<f64> {
        (0..28).map(|i| f64::from(i * 37 % 23) / 11. - 1.).collect()
    }

    fn passed<T: HeadFloat>(
        shape: &HeadShape,
        parameters: &[T],
        rows: &[T],
    ) -> Result<HeadPass<T>> {
        let mut pass = HeadPass::default();
        pass.forward(shape, parameters, FlatMatrix::new(rows, shape.width)?)?;
        Ok(pass)
    }

    /// Heads on frozen embeddings, case T4: only the last layer. The hidden layers pass (3, 4) on: with a large bias of the hidden layer
    /// GELU is the identity.
    #[test]
    fn the_last_layer_has_the_specified_values() -> Result<()> {
        let shape = HeadShape { width: 1, hidden: 1, bottleneck: 2, clusters: 3 };
        // GELU(40) is 40 exactly; 40 · (.075, .1) is (3, 4).
        let parameters =
            [0., 40., 0.075, 0.1, 0., 0., 2., 0., 0., 0.5, -3., 4., 1., 1., 2.].to_vec();
        let mut pass = passed(&shape, &parameters, &[1f64])?;
        assert_near(&pass.logits, &[0.6, 0.8, 0.56], 1e-12);
        pass.backward(&shape, &parameters, FlatMatrix::new(&[1.], 1)?, vec![1., 2., -1.])?;
        let gradient = &pass.gradient;
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
            let logits = passed(&SHAPE, parameters, &rows)?.logits;
            Ok(logits.iter().zip(&weights).map(|(l, w)| l * w).sum())
        };
        // The memory of a larger pass changes nothing.
        let mut pass = passed(&SHAPE, &parameters, &rows.repeat(3))?;
        pass.backward(
            &SHAPE,
            &parameters,
            FlatMatrix::new(&rows.repeat(3), 4)?,
            weights.repeat(3),
        )?;
        let view = FlatMatrix::new(&rows, 4)?;
        pass.forward(&SHAPE, &parameters, view)?;
        pass.backward(&SHAPE, &parameters, view, weights.clone())?;
        let gradient = &pass.gradient;
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
        let got = passed(&SHAPE, &narrow, &values)?.logits;
        let want = passed(&SHAPE, &wide, &as_wide)?.logits;
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
