//! Convolutions and linear layers: gathered maps and one matrix product.
//!
//! `y = columns(x) · W`, where a row of the columns holds what one output pixel sees, tap by tap
//! (im2col). The weights' gradient is `columns(x)ᵀ · g`. The input's gradient is, with stride 1, a
//! convolution of `g` by the same means; with larger strides `g · Wᵀ` gives what each tap passes
//! back, and every pixel adds the ones that are its own (col2im).

use candle_core::{DType, Result, Tensor};
use kernels::Shape;
use kernels::convolution::Geometry;

use super::indices::{Part, Windows};
use super::{Place, matmul};

/// Numbers in one matrix of columns at most; larger batches are cut into runs of images. 1 GiB of
/// f32, and few enough for 32-bit addresses in the devices' kernels.
const COLUMNS: usize = 1 << 28;

/// A convolution on a place; `weight` is (O, I, KH, KW) in f32 or, with kernel 1, (O, I).
pub(super) struct Product<'a> {
    place: &'a Place,
    g: Geometry,
    windows: Windows,
    /// Numbers in one matrix of columns at most.
    limit: usize,
}

impl<'a> Product<'a> {
    pub fn new(place: &'a Place, g: Geometry) -> Product<'a> {
        Product { place, g, windows: Windows::of_convolution(&g), limit: COLUMNS }
    }

    /// (N, H·W, I) to (N, H'·W', O).
    pub fn forward(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cudnn")]
        if self.is_for_cudnn(x) {
            return super::cudnn::forward(&self.g, x, &self.channels_last(weight, x.dtype())?);
        }
        let by_tap = self.weight(weight, [2, 3, 1, 0], x.dtype())?;
        self.by_images(self.g.input.channels, |first, count| {
            let columns = self.columns(&x.narrow(0, first, count)?)?;
            matmul(&columns, &by_tap)?.reshape(value(self.g.output, count))
        })
    }

    /// The gradient of the input, (N, H·W, I), from that of the output.
    pub fn input_gradient(&self, gradient: &Tensor, weight: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cudnn")]
        if self.is_for_cudnn(gradient) {
            let weight = self.channels_last(weight, gradient.dtype())?;
            return super::cudnn::input_gradient(&self.g, gradient, &weight);
        }
        let (input, output) = (self.g.input, self.g.output);
        let (taps, pixels) = (self.windows.taps(), output.pixels());
        if self.g.stride == 1 {
            let by_tap = self.weight(weight, [2, 3, 0, 1], gradient.dtype())?;
            return self.by_images(output.channels, |first, count| {
                let seeing = self.gather(&gradient.narrow(0, first, count)?, Part::Seeing)?;
                let rows = seeing.reshape((count * input.pixels(), taps * output.channels))?;
                matmul(&rows, &by_tap)?.reshape(value(input, count))
            });
        }
        let to_taps = self.weight(weight, [0, 2, 3, 1], gradient.dtype())?;
        let to_taps = to_taps.reshape((output.channels, taps * input.channels))?;
        let covers = self.place.indices(self.windows, Part::Covers)?;
        self.by_images(input.channels, |first, count| {
            let rows = gradient.narrow(0, first, count)?;
            let rows = rows.reshape((count * pixels, output.channels))?;
            let passed = matmul(&rows, &to_taps)?;
            let passed = passed.reshape((count, pixels * taps, input.channels))?;
            let mut sum: Option<Tensor> = None;
            for cover in covers.iter() {
                let of_pixels = passed.index_select(cover, 1)?;
                sum = Some(match sum {
                    Some(sum) => (sum + of_pixels)?,
                    None => of_pixels,
                });
            }
            match sum {
                Some(sum) => Ok(sum),
                None => Tensor::zeros(value(input, count), gradient.dtype(), gradient.device()),
            }
        })
    }

    /// The gradient of the weights, flat in the order (O, I, KH, KW), f32.
    pub fn weight_gradient(&self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cudnn")]
        if self.is_for_cudnn(x) {
            let made = super::cudnn::weight_gradient(&self.g, x, gradient)?;
            return made.to_dtype(DType::F32)?.permute((0, 3, 1, 2))?.flatten_all();
        }
        let (taps, to) = (self.windows.taps(), self.g.output.channels);
        let mut sum: Option<Tensor> = None;
        for (first, count) in self.runs(self.g.input.channels) {
            let columns = self.columns(&x.narrow(0, first, count)?)?;
            let rows = gradient.narrow(0, first, count)?;
            let rows = rows.reshape((count * self.g.output.pixels(), to))?;
            let part = matmul(&columns.t()?, &rows)?.to_dtype(DType::F32)?;
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        let sum = sum.expect("a batch has an image");
        sum.reshape((taps, self.g.input.channels, to))?.permute((2, 1, 0))?.flatten_all()
    }

    /// Linear layers are left to cuBLAS.
    #[cfg(feature = "cudnn")]
    fn is_for_cudnn(&self, value: &Tensor) -> bool {
        value.device().is_cuda() && self.g.input.pixels() > 1
    }

    /// What each output pixel sees, (N·H'·W', K·K·I).
    fn columns(&self, x: &Tensor) -> Result<Tensor> {
        let rows = x.dim(0)? * self.g.output.pixels();
        let gathered = self.gather(x, Part::Seen)?;
        gathered.reshape((rows, self.windows.taps() * self.g.input.channels))
    }

    fn gather(&self, x: &Tensor, part: Part) -> Result<Tensor> {
        if self.windows.are_pixels() {
            return Ok(x.clone());
        }
        x.contiguous()?.index_select(&self.place.indices(self.windows, part)?[0], 1)
    }

    /// The weights as (O, KH, KW, I).
    #[cfg(feature = "cudnn")]
    fn channels_last(&self, weight: &Tensor, dtype: DType) -> Result<Tensor> {
        let Geometry { input, output, kernel, .. } = self.g;
        let weight = weight.reshape((output.channels, input.channels, kernel, kernel))?;
        weight.to_dtype(dtype)?.permute((0, 2, 3, 1))?.contiguous()
    }

    /// The weights with their four axes in this order, as a matrix whose columns are the last one.
    fn weight(&self, weight: &Tensor, order: [usize; 4], dtype: DType) -> Result<Tensor> {
        let Geometry { input, output, kernel, .. } = self.g;
        let weight = weight.reshape((output.channels, input.channels, kernel, kernel))?;
        let weight = weight.to_dtype(dtype)?.permute(order)?.contiguous()?;
        let columns = weight.dim(3)?;
        weight.reshape(((), columns))
    }

    /// Applies `f` to runs of images whose columns stay below the limit, `channels` wide per tap.
    fn by_images(
        &self,
        channels: usize,
        f: impl Fn(usize, usize) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let runs = self.runs(channels);
        if let [(first, count)] = runs[..] {
            return f(first, count);
        }
        let parts: Vec<_> =
            runs.into_iter().map(|(first, count)| f(first, count)).collect::<Result<_>>()?;
        Tensor::cat(&parts, 0)
    }

    fn runs(&self, channels: usize) -> Vec<(usize, usize)> {
        let images = self.g.input.images;
        let pixels = self.g.input.pixels().max(self.g.output.pixels());
        let step = (self.limit / (pixels * self.windows.taps() * channels)).max(1);
        (0..images).step_by(step).map(|first| (first, step.min(images - first))).collect()
    }
}

fn value(shape: Shape, images: usize) -> (usize, usize, usize) {
    (images, shape.pixels(), shape.channels)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn a_batch_cut_into_runs_of_images_gives_what_the_whole_one_gives() -> Result<()> {
        let place = Place::new(&Device::Cpu);
        for stride in [1, 2] {
            let g = Geometry::new(Shape::new(5, 4, 3, 2), 3, 3, stride, 1).expect("pixels");
            let whole = Product::new(&place, g);
            // Two images of 12 pixels and 9 taps at a time, of up to 3 channels.
            let cut = Product { limit: 2 * 12 * 9 * 3, ..Product::new(&place, g) };
            assert!(cut.runs(3) == [(0, 2), (2, 2), (4, 1)] && whole.runs(3) == [(0, 5)]);
            let random = |shape| Tensor::rand(-1f32, 1., shape, &Device::Cpu);
            let x = random(value(g.input, 5))?;
            let (w, gradient) = (random((3, 2, 9))?, random(value(g.output, 5))?);
            let same = |a: Tensor, b: Tensor| -> Result<()> {
                let (a, b) = (a.flatten_all()?.to_vec1::<f32>()?, b.flatten_all()?.to_vec1()?);
                assert!(a.iter().zip(&b).all(|(a, b): (_, &f32)| (a - b).abs() < 1e-5));
                Ok(())
            };
            same(whole.forward(&x, &w)?, cut.forward(&x, &w)?)?;
            same(whole.input_gradient(&gradient, &w)?, cut.input_gradient(&gradient, &w)?)?;
            same(whole.weight_gradient(&x, &gradient)?, cut.weight_gradient(&x, &gradient)?)?;
        }
        Ok(())
    }
}
