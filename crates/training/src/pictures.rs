//! Views of a batch, from the loader to a device.

use anyhow::{Result, anyhow, ensure};
use candle_core::{Device, Tensor};

/// The views of a batch as tensors `(B, H, W, C)` of f32, in their order.
///
/// - `shape`: `(B, H, W, C)`, of every view.
/// - `views`: by view, the values as the loader made them, in that layout.
///
/// # Errors
///
/// There are not `VIEWS` of them, a view has other values than the shape asks for, or the device
/// refuses.
pub fn pictures<const VIEWS: usize>(
    shape: (usize, usize, usize, usize),
    views: Vec<Vec<f32>>,
    device: &Device,
) -> Result<[Tensor; VIEWS]> {
    let found = views.len();
    ensure!(found == VIEWS, "a batch holds {found} views of each picture where {VIEWS} are needed");
    let tensor = |values| Ok(Tensor::from_vec(values, shape, device)?);
    let tensors = views.into_iter().map(tensor).collect::<Result<Vec<_>>>()?;
    tensors.try_into().map_err(|_| anyhow!("{VIEWS} views made fewer tensors"))
}

#[cfg(test)]
mod tests {
    use candle_core::Device::Cpu;

    use super::*;

    #[test]
    fn views_keep_their_order_and_layout() -> Result<()> {
        let view = |first: u8| (first..first + 12).map(f32::from).collect::<Vec<f32>>();
        let [one, other] = pictures((1, 2, 3, 2), vec![view(0), view(50)], &Cpu)?;
        assert_eq!(one.dims(), [1, 2, 3, 2]);
        assert_eq!(one.get(0)?.get(1)?.to_vec2::<f32>()?, [[6., 7.], [8., 9.], [10., 11.]]);
        assert_eq!(other.flatten_all()?.to_vec1::<f32>()?, view(50));
        Ok(())
    }

    #[test]
    fn other_numbers_of_views_or_values_are_refused() {
        for views in [vec![vec![0.; 4]], vec![vec![0.; 4]; 3], vec![vec![0.; 4], vec![0.; 5]]] {
            assert!(pictures::<2>((1, 2, 2, 1), views, &Cpu).is_err());
        }
    }
}
