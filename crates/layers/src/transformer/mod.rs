//! Vision Transformers for inference: one plan that covers the published families, and its forward pass on
//! the CPU's kernels and on candle's devices.

mod network;
mod on_kernels;
mod on_tensors;
mod plan;
mod positions;
mod weights;

pub use network::{TokensAfter, Transformer, TransformerOutput};
pub use plan::{
    Activation, FinalNorm, Mlp, Positions, Resampling, TransformerPlan, TransformerTensor,
};
pub use weights::TransformerWeights;

use on_kernels::OnKernels;
use on_tensors::OnTensors;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::{DType, Device, Result, Tensor};
    use kernels::{Precision, Variant};

    use super::*;

    /// A narrow network in DINOv2's form.
    pub(crate) fn plan() -> TransformerPlan {
        TransformerPlan {
            patch_pixels: 4,
            patch_bias: true,
            width: 24,
            depth: 2,
            heads: 3,
            key_bias: true,
            mlp: Mlp::Plain { hidden: 40, activation: Activation::GeluErf },
            layer_scale: true,
            class_token: true,
            registers: 0,
            positions: Positions::Absolute { grid: 3, resampling: Resampling::Size },
            pre_norm: false,
            final_norm: FinalNorm::AllTokens,
            epsilon: 1e-6,
            attention_pooling: false,
            projection: None,
        }
    }

    /// Numbers of a plan: norms and scales around 1, everything else small around 0.
    pub(crate) fn noise_weights(
        plan: &TransformerPlan,
        seed: u64,
    ) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
        let mut state = seed;
        let mut next = move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / 8_388_608. - 1.
        };
        let mut numbers = |TransformerTensor { name, shape }: TransformerTensor| {
            let is_scale =
                name.contains("scale") || name.contains("norm") && name.ends_with("weight");
            let offset = if is_scale { 1. } else { 0. };
            let len: usize = shape.iter().product();
            let size =
                if shape.len() > 1 { 2. / (len as f32 / shape[0] as f32).sqrt() } else { 0.3 };
            (name, (shape, (0..len).map(|_| offset + size * next()).collect()))
        };
        plan.tensors().into_iter().map(&mut numbers).collect()
    }

    #[test]
    fn a_plan_survives_json_and_refuses_unknown_keys() {
        let plan = TransformerPlan { projection: Some(5), ..plan() };
        let text = serde_json::to_string(&plan).expect("JSON");
        assert!(
            text.contains(r#""mlp":{"kind":"plain","hidden":40,"activation":"gelu-erf"}"#),
            "{text}"
        );
        assert_eq!(serde_json::from_str::<TransformerPlan>(&text).expect("a plan"), plan);
        let unknown = text.replace("\"depth\"", "\"dept\"");
        let error = serde_json::from_str::<TransformerPlan>(&unknown).expect_err("unknown");
        assert!(error.to_string().contains("dept"), "{error}");
    }

    #[test]
    fn contradictions_are_errors_that_name_the_values() {
        assert!(plan().check().is_ok());
        let rotary = Positions::Rotary { base: 100. };
        let cases = [
            (TransformerPlan { heads: 5, ..plan() }, "5 heads"),
            (TransformerPlan { depth: 0, ..plan() }, "depth is 0"),
            (TransformerPlan { width: usize::MAX, ..plan() }, "width"),
            (TransformerPlan { epsilon: 0., ..plan() }, "epsilon"),
            (TransformerPlan { heads: 4, positions: rotary, ..plan() }, "multiple of 4"),
            (TransformerPlan { class_token: false, projection: Some(3), ..plan() }, "class token"),
            (TransformerPlan { attention_pooling: true, projection: Some(3), ..plan() }, "exclude"),
        ];
        for (plan, part) in cases {
            let error = plan.check().expect_err(part).to_string();
            assert!(error.contains(part), "{error}");
        }
        let error = plan().patch_grid(9, 8).expect_err("a remainder").to_string();
        assert!(error.contains("9 × 8") && error.contains("multiples of 4"), "{error}");
    }

    #[test]
    fn a_vit_small_has_the_published_number_of_parameters() {
        // `facebook/dinov2-small` has 22,056,576, with a mask token and the class token's position.
        let small = TransformerPlan {
            patch_pixels: 14,
            width: 384,
            depth: 12,
            heads: 6,
            mlp: Mlp::Plain { hidden: 1536, activation: Activation::GeluErf },
            positions: Positions::Absolute { grid: 37, resampling: Resampling::Size },
            ..plan()
        };
        let tensors = small.tensors();
        let count: usize = tensors.iter().map(|t| t.shape.iter().product::<usize>()).sum();
        assert_eq!(count, 22_056_576 - 2 * 384);
        assert!(
            tensors.iter().any(|t| t.name == "blocks.11.down.weight" && t.shape == [384, 1536])
        );
    }

    /// Plans that between them take every switch, on heads and widths that are not multiples of a tile.
    fn plans() -> Vec<TransformerPlan> {
        let antialias = Positions::Absolute { grid: 3, resampling: Resampling::Antialias };
        let plain = |activation| Mlp::Plain { hidden: 40, activation };
        vec![
            plan(),
            TransformerPlan {
                registers: 2,
                mlp: Mlp::Gated { hidden: 20 },
                positions: antialias,
                ..plan()
            },
            TransformerPlan {
                registers: 1,
                positions: Positions::Rotary { base: 100. },
                key_bias: false,
                ..plan()
            },
            TransformerPlan {
                patch_bias: false,
                pre_norm: true,
                layer_scale: false,
                mlp: plain(Activation::GeluQuick),
                final_norm: FinalNorm::ClassToken,
                projection: Some(7),
                ..plan()
            },
            TransformerPlan {
                class_token: false,
                layer_scale: false,
                mlp: plain(Activation::GeluTanh),
                attention_pooling: true,
                ..plan()
            },
            TransformerPlan { class_token: false, ..plan() },
        ]
    }

    fn weights(plan: &TransformerPlan) -> TransformerWeights {
        TransformerWeights::new(plan, noise_weights(plan, 3)).expect("fitting numbers")
    }

    /// Pictures of 12 × 20 pixels.
    fn pictures(n: usize) -> Result<Tensor> {
        let numbers = noise_weights(&TransformerPlan { width: 20 * n, heads: 1, ..plan() }, 9);
        let numbers = numbers["blocks.0.up.weight"].1.iter().map(|x| 9. * x).cycle();
        Tensor::from_iter(numbers.take(n * 12 * 20 * 3), &Device::Cpu)?.reshape((n, 12, 20, 3))
    }

    fn rows(tensor: &Tensor) -> Result<Vec<f32>> {
        tensor.flatten_all()?.to_vec1()
    }

    /// All outputs, one after the other.
    fn outputs(output: &TransformerOutput) -> Result<Vec<f32>> {
        let TransformerOutput { class, patch_mean, pooled, projection } = output;
        let parts = [class.as_ref(), Some(patch_mean), pooled.as_ref(), projection.as_ref()];
        parts.into_iter().flatten().map(rows).collect::<Result<Vec<_>>>().map(|rows| rows.concat())
    }

    /// `‖a − b‖ / ‖b‖`.
    fn distance(a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        let off: f32 = a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum();
        (off / b.iter().map(|b| b * b).sum::<f32>()).sqrt()
    }

    #[test]
    fn kernels_and_tensor_operations_agree() -> Result<()> {
        for plan in plans() {
            let (weights, pictures) = (weights(&plan), pictures(3)?);
            // By norm: f32 rounds sums of a few dozen terms; bf16 rounds each factor by up to 2⁻⁹.
            for (precision, bound) in [(Precision::F32, 2e-6), (Precision::Bf16, 5e-2)] {
                let tensors = Transformer::on_tensors(&weights, &Device::Cpu, precision)?;
                let want = outputs(&tensors.forward(&pictures)?)?;
                for variant in Variant::testable() {
                    let network = Transformer::on_variant(&weights, variant, precision);
                    let output = network.forward(&pictures)?;
                    assert_eq!(output.feature().dims(), [3, plan.feature_width()]);
                    let off = distance(&outputs(&output)?, &want);
                    assert!(off < bound, "{variant} {precision:?} {plan:?}: {off:e}");
                }
            }
        }
        Ok(())
    }

    /// Pretrained networks, case T18.
    #[test]
    fn a_picture_has_the_same_bits_alone_in_any_batch_and_on_any_threads() -> Result<()> {
        let pictures = pictures(19)?;
        for plan in plans() {
            let weights = weights(&plan);
            for (variant, precision) in Variant::testable()
                .into_iter()
                .flat_map(|v| [Precision::F32, Precision::Bf16].map(|p| (v, p)))
            {
                let network = Transformer::on_variant(&weights, variant, precision);
                let on = |threads: usize, first: usize, n: usize| {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                    let pictures = pictures.narrow(0, first, n)?.contiguous()?;
                    let feature = || rows(network.forward(&pictures)?.feature());
                    pool.expect("threads").install(feature)
                };
                let (all, d) = (on(1, 0, 19)?, plan.feature_width());
                assert_eq!(all, on(2, 0, 19)?, "{variant}");
                assert_eq!(all, on(3, 0, 19)?, "{variant}");
                assert_eq!(all[2 * d..9 * d], on(2, 2, 7)?, "{variant}");
                assert_eq!(all[6 * d..7 * d], on(1, 6, 1)?, "{variant}");
                assert_ne!(all[..d], all[d..2 * d]);
            }
        }
        Ok(())
    }

    /// With `λ = 0` and all weights of the patches 0, the tokens stay `bias + position` and can be computed by
    /// hand: the final norm turns (1, 3) into (−1, 1).
    #[test]
    fn tokens_are_as_computed_by_hand() -> Result<()> {
        let plan = TransformerPlan {
            width: 2,
            heads: 1,
            positions: Positions::Absolute { grid: 1, resampling: Resampling::Size },
            ..plan()
        };
        let mut numbers = noise_weights(&plan, 1);
        for (name, (_, numbers)) in &mut numbers {
            if name.contains("scale") || name == "patch.weight" {
                numbers.fill(0.);
            }
        }
        let mut set = |name: &str, values: [f32; 2]| {
            numbers.get_mut(name).expect("there").1 = values.to_vec()
        };
        set("patch.bias", [1., 5.]);
        set("positions", [0., -2.]);
        set("cls", [4., 0.]);
        set("norm.weight", [1., 1.]);
        set("norm.bias", [0., 10.]);
        let network = Transformer::on_variant(
            &TransformerWeights::new(&plan, numbers)?,
            Variant::PORTABLE,
            Precision::F32,
        );
        let picture = Tensor::ones((1, 4, 8, 3), DType::F32, &Device::Cpu)?;
        assert_eq!(
            rows(&network.tokens(&picture, TokensAfter::Embedding)?)?,
            [4., 0., 1., 3., 1., 3.]
        );
        assert_eq!(
            rows(&network.tokens(&picture, TokensAfter::Blocks(2))?)?,
            [4., 0., 1., 3., 1., 3.]
        );
        let output = network.forward(&picture)?;
        for (got, want) in rows(output.feature())?.iter().zip([1., 9.]) {
            assert!((got - want).abs() < 1e-5, "{got}");
        }
        for (got, want) in rows(&output.patch_mean)?.iter().zip([-1., 11.]) {
            assert!((got - want).abs() < 1e-5, "{got}");
        }
        Ok(())
    }

    #[test]
    fn foreign_pictures_are_errors_that_say_what_is_wanted() -> Result<()> {
        let network = Transformer::on_variant(&weights(&plan()), Variant::PORTABLE, Precision::F32);
        for (shape, dtype, part) in [
            (vec![1, 3, 8, 8], DType::F32, "(N, H, W, 3)"),
            (vec![1, 8, 8, 3], DType::F64, "takes f32"),
            (vec![0, 8, 8, 3], DType::F32, "at least one"),
            (vec![1, 8, 9, 3], DType::F32, "multiples of 4"),
        ] {
            let pictures = Tensor::zeros(shape, dtype, &Device::Cpu)?;
            let error = network.forward(&pictures).expect_err(part).to_string();
            assert!(error.contains(part), "{error}");
        }
        let error = network.tokens(&pictures(1)?, TokensAfter::Blocks(3)).expect_err("two blocks");
        assert!(error.to_string().contains("3 blocks"), "{error}");
        Ok(())
    }
}
