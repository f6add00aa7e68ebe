//! What a picture costs in the networks that learn, counted from their plans.

use anyhow::Result;
use data::views::Input;
use layers::Network;
use stage::PictureCost;

/// The multiply-adds of one picture of `input` through a backbone, a projector and what follows, each
/// fed with the output of the one before.
///
/// - `frozen`: blocks of the backbone that do not learn.
///
/// # Errors
///
/// The networks do not fit each other or the input.
pub fn picture_cost(
    [backbone, projector]: [&Network; 2],
    predictor: Option<&Network>,
    frozen: &[String],
    input: &Input,
) -> Result<PictureCost> {
    let picture = [1, input.height, input.width, input.channels];
    let of_backbone = backbone.multiply_adds(&picture, frozen, false)?;
    let of_projector = projector.multiply_adds(&[1, backbone.output_width()], &[], true)?;
    let projection = of_backbone.forward + of_projector.forward;
    let mut learning = of_backbone.learning() + of_projector.learning();
    if let Some(predictor) = predictor {
        learning += predictor.multiply_adds(&[1, projector.output_width()], &[], true)?.learning();
    }
    Ok(PictureCost { embedding: of_backbone.forward, projection, learning })
}

#[cfg(test)]
mod tests {
    use backbone::{Architecture, Depth, Stem, perceptron, resnet};

    use super::*;

    /// ResNet-18 for small pictures, counted by hand: along a side of n pixels a 3×3 kernel meets
    /// 3n − 2 pixels, and with stride 2 3n/2 − 1.
    #[test]
    fn the_cost_of_resnet_18_is_the_one_counted_by_hand_at_two_crop_sizes() -> Result<()> {
        let shape = Architecture { depth: Depth::Eighteen, width: 64, stem: Stem::Plain };
        let backbone = resnet::plan(&shape, 3)?;
        let projector = perceptron::plan(512, 512, 128)?;
        let predictor = perceptron::plan(128, 256, 128)?;
        let linear = [512. * 512. + 512. * 128., 128. * 256. + 256. * 128.];
        for (side, forward, stem) in [(32, 481_854_208., 1_696_512.), (24, 258_341_632., 940_800.)]
        {
            let input = Input {
                height: side,
                width: side,
                channels: 3,
                mean: vec![0.5; 3],
                std: vec![0.5; 3],
                clean: vec![],
            };
            let cost = picture_cost([&backbone, &projector], Some(&predictor), &[], &input)?;
            assert_eq!(cost.embedding, forward);
            assert_eq!(cost.projection, forward + linear[0]);
            // Three products a layer, but no gradient of the pictures.
            assert_eq!(cost.learning, 3. * (forward + linear[0] + linear[1]) - stem);
            let without = picture_cost([&backbone, &projector], None, &[], &input)?;
            assert_eq!(without.learning, 3. * (forward + linear[0]) - stem);
        }
        Ok(())
    }
}
