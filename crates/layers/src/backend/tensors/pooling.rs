//! Max-pool, with the tap that held each maximum, and average pool.

use candle_core::{DType, Result, Tensor};
use kernels::Shape;
use kernels::pooling::Window;

use super::indices::{IndexTable, IndexTables, Windows};

/// The maximum of each window, (N, H'·W', C), and the tap that held it, u8: the first of equal ones.
pub(super) fn max_forward(
    tables: &IndexTables,
    w: &Window,
    x: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let windows = Windows::of_pool(w);
    let inside = tables.get(windows, IndexTable::PixelOfTap)?;
    let taps = tables.get(windows, IndexTable::FirstTapOfWindow)?;
    let (first_taps, numbers) = (&taps[0], &taps[1]);
    let x = x.contiguous()?;
    // A tap beyond the border reads the window's first pixel again, which is never larger.
    let mut best = x.index_select(&inside[0], 1)?;
    let mut taps = first_taps.broadcast_as(best.shape())?.contiguous()?;
    for (tap, pixels) in inside.iter().enumerate().skip(1) {
        let other = x.index_select(pixels, 1)?;
        let larger = other.gt(&best)?;
        let number = numbers.narrow(0, tap, 1)?.broadcast_as(taps.shape())?;
        best = larger.where_cond(&other, &best)?;
        taps = larger.where_cond(&number, &taps)?;
    }
    Ok((best, taps))
}

/// The gradient of the input: a pixel receives it from the windows whose maximum it was.
pub(super) fn max_backward(
    tables: &IndexTables,
    w: &Window,
    gradient: &Tensor,
    taps: &Tensor,
) -> Result<Tensor> {
    let covers = tables.get(Windows::of_pool(w), IndexTable::WindowsAndTapsOfPixel)?;
    let gradient = gradient.contiguous()?;
    let mut sum: Option<Tensor> = None;
    for pair in covers.chunks_exact(2) {
        let (windows, own) = (&pair[0], &pair[1]);
        let held = taps.index_select(windows, 1)?.broadcast_eq(own)?;
        let part = (gradient.index_select(windows, 1)? * held.to_dtype(gradient.dtype())?)?;
        sum = Some(match sum {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    Ok(sum.expect("a window covers a pixel"))
}

/// Means over all pixels, (N, 1, C).
pub(super) fn average_forward(x: &Tensor) -> Result<Tensor> {
    let (n, pixels, _) = x.dims3()?;
    if pixels == 1 {
        return Ok(x.clone());
    }
    let ones = Tensor::ones((n, 1, pixels), DType::F32, x.device())?;
    let sums = ones.matmul(&x.to_dtype(DType::F32)?.contiguous()?)?;
    (sums / pixels as f64)?.to_dtype(x.dtype())
}

pub(super) fn average_backward(shape: Shape, gradient: &Tensor) -> Result<Tensor> {
    let share = (gradient / shape.pixels() as f64)?;
    share.broadcast_as((shape.images, shape.pixels(), shape.channels))?.contiguous()
}
