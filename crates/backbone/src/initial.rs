//! Initial weights.
//!
//! - Convolutions: normal with variance `2 / (O·KH·KW)` (Kaiming, fan-out). The 3×3 stem is uniform within
//!   `±1/√fan_in` (Kaiming-uniform with a = √5, the default of the framework in which it replaces the
//!   published stem), except in a segment named `encoder`, as IMC-SwAV and SeCu publish fan-out.
//! - Linear layers: weight and bias uniform within `±1/√fan_in`. In the predictor, the weights are normal
//!   with deviation 0.01 and the biases 0.
//! - Batch norm: weight 1 and bias 0, for the last one of a block too.
//!
//! Every tensor has its own random stream, named after it, so that adding or removing a layer does not change
//! the weights of others.

use layers::EntryKind;
use rand::RngExt;
use rand_distr::{Distribution, Normal, Uniform};

/// The distribution of a tensor's initial values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum InitialDistribution {
    /// The same value everywhere.
    Constant(f32),
    /// Normal with mean 0 and this deviation.
    Normal(f64),
    /// Uniform between minus and plus this bound.
    Uniform(f64),
}

impl InitialDistribution {
    /// The distribution for a parameter of `segment`. `weight_shape` is the shape of the parameter, or for a
    /// bias that of its weight.
    pub(crate) fn of(segment: &str, name: &str, kind: EntryKind, weight_shape: &[usize]) -> Self {
        let fan_in = weight_shape.iter().skip(1).product::<usize>() as f64;
        let fan_out =
            (weight_shape.iter().product::<usize>() / weight_shape.get(1).unwrap_or(&1)) as f64;
        match kind {
            // Fan-out is published for the 7×7 stem only.
            EntryKind::ConvolutionWeight
                if segment != "encoder"
                    && name == "conv1.weight"
                    && weight_shape[2..] == [3, 3] =>
            {
                Self::Uniform(1. / fan_in.sqrt())
            }
            EntryKind::ConvolutionWeight => Self::Normal((2. / fan_out).sqrt()),
            EntryKind::LinearWeight if segment == "predictor" => Self::Normal(0.01),
            EntryKind::LinearBias if segment == "predictor" => Self::Constant(0.),
            EntryKind::LinearWeight | EntryKind::LinearBias => Self::Uniform(1. / fan_in.sqrt()),
            EntryKind::NormWeight | EntryKind::RunningVariance => Self::Constant(1.),
            EntryKind::NormBias | EntryKind::RunningMean => Self::Constant(0.),
        }
    }

    /// Draws `count` values for the tensor `segment.name` of a run with this seed.
    pub(crate) fn values(self, seed: u64, segment: &str, name: &str, count: usize) -> Vec<f32> {
        let mut random = stage::random::stream(seed, &format!("weights of {segment}.{name}"), &[]);
        let sample = |draw: &mut dyn FnMut() -> f64| (0..count).map(|_| draw() as f32).collect();
        match self {
            Self::Constant(value) => vec![value; count],
            Self::Normal(deviation) => {
                let normal = Normal::new(0., deviation).expect("a positive deviation");
                sample(&mut || normal.sample(&mut random))
            }
            Self::Uniform(bound) => {
                let uniform = Uniform::new(-bound, bound).expect("a positive bound");
                sample(&mut || random.sample(uniform))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_layer_has_its_published_distribution() {
        use InitialDistribution::{Constant, Normal, Uniform};
        let conv = |name, shape: &[usize]| {
            InitialDistribution::of("backbone", name, EntryKind::ConvolutionWeight, shape)
        };
        assert_eq!(conv("conv1.weight", &[64, 3, 7, 7]), Normal((2f64 / 3136.).sqrt()));
        assert_eq!(conv("conv1.weight", &[64, 3, 3, 3]), Uniform(1. / 27f64.sqrt()));
        let encoder = InitialDistribution::of(
            "encoder",
            "conv1.weight",
            EntryKind::ConvolutionWeight,
            &[64, 3, 3, 3],
        );
        assert_eq!(encoder, Normal((2f64 / 576.).sqrt()));
        assert_eq!(conv("layer1.0.conv1.weight", &[16, 8, 3, 3]), Normal((2f64 / 144.).sqrt()));
        let norm = |kind| InitialDistribution::of("backbone", "layer1.0.bn2.weight", kind, &[16]);
        assert_eq!(norm(EntryKind::NormWeight), Constant(1.));
        assert_eq!(norm(EntryKind::NormBias), Constant(0.));
        for kind in [EntryKind::LinearWeight, EntryKind::LinearBias] {
            let draw = InitialDistribution::of("projector", "hidden.weight", kind, &[512, 128]);
            assert_eq!(draw, Uniform(1. / 128f64.sqrt()));
        }
        let predictor =
            |kind| InitialDistribution::of("predictor", "hidden.weight", kind, &[512, 128]);
        assert_eq!(predictor(EntryKind::LinearWeight), Normal(0.01));
        assert_eq!(predictor(EntryKind::LinearBias), Constant(0.));
    }

    #[test]
    fn draws_have_the_stated_deviation_and_differ_by_seed_and_name() {
        let spread = |values: &[f32]| {
            (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt()
        };
        let normal =
            InitialDistribution::Normal(0.01).values(1, "predictor", "hidden.weight", 20_000);
        assert!((spread(&normal) / 0.01 - 1.).abs() < 0.02, "{}", spread(&normal));
        let uniform =
            InitialDistribution::Uniform(0.3).values(1, "projector", "hidden.weight", 20_000);
        assert!((spread(&uniform) * 3f32.sqrt() / 0.3 - 1.).abs() < 0.02);
        assert!(uniform.iter().all(|v| v.abs() <= 0.3));
        assert_ne!(
            uniform,
            InitialDistribution::Uniform(0.3).values(2, "projector", "hidden.weight", 20_000)
        );
        assert_ne!(
            uniform,
            InitialDistribution::Uniform(0.3).values(1, "projector", "output.weight", 20_000)
        );
    }
}
