//! Vision Transformers for inference: one plan that covers the published families, and its forward pass.

mod plan;
mod weights;

pub use plan::{
    Activation, FinalNorm, Mlp, Positions, Resampling, TransformerPlan, TransformerTensor,
};
pub use weights::TransformerWeights;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

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
}
