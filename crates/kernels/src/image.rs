//! Rows of pictures: what augmentation costs in time is decided here.
//!
//! Each function is plain Rust over slices, compiled once for the baseline of the target and, on
//! x86-64, again for AVX2 and AVX-512; the best the processor has is chosen at run time. No product
//! is fused with an addition and every sum has one order, so all give the same bits.
//!
//! Planes are one channel each, row by row, in 32-bit floats of range `[0, 1]`.

/// Compiles a body for several instruction sets and chooses among them when it is called.
macro_rules! dispatched {
    ($(#[$attribute:meta])* pub fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $out:ty)? $body:block) => {
        $(#[$attribute])*
        pub fn $name($($argument: $type),*) $(-> $out)? {
            #[inline(always)]
            fn body($($argument: $type),*) $(-> $out)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) $(-> $out)? {
                    body($($argument),*)
                }
                #[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
                fn avx512($($argument: $type),*) $(-> $out)? {
                    body($($argument),*)
                }
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    #[expect(unsafe_code, reason = "compiled for instructions found above")]
                    // SAFETY: the processor has the instructions.
                    return unsafe { avx512($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    #[expect(unsafe_code, reason = "compiled for instructions found above")]
                    // SAFETY: the processor has the instructions.
                    return unsafe { avx2($($argument),*) };
                }
            }
            body($($argument),*)
        }
    };
}

/// Floats that are worked on at a time: enough for the widest registers several times over.
const CHUNK: usize = 64;

dispatched! {
    /// Weighted sum of rows of bytes: `out[i] = Σ_k weights[k] · bytes[k · stride + i]`.
    ///
    /// # Panics
    ///
    /// `bytes` is too short.
    pub fn mix_byte_rows(out: &mut [f32], bytes: &[u8], stride: usize, weights: &[f32]) {
        let width = out.len();
        let mut at = 0;
        while at < width {
            let length = CHUNK.min(width - at);
            let mut sums = [0f32; CHUNK];
            for (k, &weight) in weights.iter().enumerate() {
                let row = &bytes[k * stride + at..][..length];
                if let Ok(row) = <&[u8; CHUNK]>::try_from(row) {
                    for (sum, &byte) in sums.iter_mut().zip(row) {
                        *sum += weight * f32::from(byte);
                    }
                } else {
                    for (sum, &byte) in sums.iter_mut().zip(row) {
                        *sum += weight * f32::from(byte);
                    }
                }
            }
            out[at..at + length].copy_from_slice(&sums[..length]);
            at += length;
        }
    }
}

dispatched! {
    /// Weighted sum of rows of floats: `out[i] = Σ_k weights[k] · values[starts[k] + i]`.
    ///
    /// # Panics
    ///
    /// `values` is too short, or `starts` and `weights` differ in length.
    pub fn mix_rows(out: &mut [f32], values: &[f32], starts: &[usize], weights: &[f32]) {
        assert_eq!(starts.len(), weights.len());
        let width = out.len();
        let mut at = 0;
        while at < width {
            let length = CHUNK.min(width - at);
            let mut sums = [0f32; CHUNK];
            for (&start, &weight) in starts.iter().zip(weights) {
                let row = &values[start + at..][..length];
                if let Ok(row) = <&[f32; CHUNK]>::try_from(row) {
                    for (sum, &value) in sums.iter_mut().zip(row) {
                        *sum += weight * value;
                    }
                } else {
                    for (sum, &value) in sums.iter_mut().zip(row) {
                        *sum += weight * value;
                    }
                }
            }
            out[at..at + length].copy_from_slice(&sums[..length]);
            at += length;
        }
    }
}

dispatched! {
    /// Weighted sums of neighbours in a row: `out[x] = Σ_k weights[x · taps + k] · row[starts[x] + k]`
    /// with `taps = weights.len() / starts.len()`.
    ///
    /// # Panics
    ///
    /// `row` is too short, or `out` and `starts` differ in length.
    pub fn mix_columns(out: &mut [f32], row: &[f32], starts: &[u32], weights: &[f32]) {
        assert_eq!(out.len(), starts.len());
        let taps = weights.len() / starts.len().max(1);
        for ((out, &start), weights) in out.iter_mut().zip(starts).zip(weights.chunks_exact(taps)) {
            let values = &row[start as usize..][..taps];
            *out = values.iter().zip(weights).fold(0., |sum, (value, weight)| sum + value * weight);
        }
    }
}

dispatched! {
    /// [`mix_columns`] for three channels side by side in `row`, taken apart into three planes.
    ///
    /// `row` has one float more than its pixels need: a fourth lane reads it and is dropped.
    ///
    /// # Panics
    ///
    /// `row` is too short, or a plane and `starts` differ in length.
    pub fn mix_colour_columns(
        red: &mut [f32],
        green: &mut [f32],
        blue: &mut [f32],
        row: &[f32],
        starts: &[u32],
        weights: &[f32],
    ) {
        let width = starts.len();
        assert!(red.len() == width && green.len() == width && blue.len() == width);
        let taps = weights.len() / width.max(1);
        for (x, weights) in weights.chunks_exact(taps).enumerate() {
            let start = 3 * starts[x] as usize;
            let values = &row[start..start + 3 * taps + 1];
            let mut sums = [0f32; 4];
            for (k, &weight) in weights.iter().enumerate() {
                let pixel: &[f32; 4] =
                    values[3 * k..3 * k + 4].try_into().expect("a slice of four has four");
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum += weight * value;
                }
            }
            red[x] = sums[0];
            green[x] = sums[1];
            blue[x] = sums[2];
        }
    }
}

dispatched! {
    /// Convolution of a row with a symmetric kernel: `kernel[0]` weighs the middle, `kernel[d]` both
    /// values at distance `d`. `padded` has `kernel.len() - 1` values more on each side than `out`.
    ///
    /// # Panics
    ///
    /// `padded` is too short.
    pub fn blur_row(out: &mut [f32], padded: &[f32], kernel: &[f32]) {
        let (radius, width) = (kernel.len() - 1, out.len());
        let padded = &padded[..width + 2 * radius];
        let mut at = 0;
        while at < width {
            let length = CHUNK.min(width - at);
            let mut sums = [0f32; CHUNK];
            for (sum, &value) in sums[..length].iter_mut().zip(&padded[at + radius..]) {
                *sum = kernel[0] * value;
            }
            for (distance, &weight) in kernel.iter().enumerate().skip(1) {
                let left = &padded[at + radius - distance..][..length];
                let right = &padded[at + radius + distance..][..length];
                let pair = (<&[f32; CHUNK]>::try_from(left), <&[f32; CHUNK]>::try_from(right));
                if let (Ok(left), Ok(right)) = pair {
                    for ((sum, &left), &right) in sums.iter_mut().zip(left).zip(right) {
                        *sum += weight * (left + right);
                    }
                } else {
                    for ((sum, &left), &right) in sums.iter_mut().zip(left).zip(right) {
                        *sum += weight * (left + right);
                    }
                }
            }
            out[at..at + length].copy_from_slice(&sums[..length]);
            at += length;
        }
    }
}

dispatched! {
    /// One channel of bytes with `channels` side by side, scaled: `out[i] = scale · bytes[i · channels]`.
    pub fn plane_of_bytes(out: &mut [f32], bytes: &[u8], channels: usize, scale: f32) {
        if channels == 1 {
            for (out, &byte) in out.iter_mut().zip(bytes) {
                *out = scale * f32::from(byte);
            }
        } else {
            for (out, pixel) in out.iter_mut().zip(bytes.chunks(channels)) {
                *out = scale * f32::from(pixel[0]);
            }
        }
    }
}

dispatched! {
    /// Three planes put side by side, each scaled and shifted: `out[3i + c] = scale[c] · plane_c[i] +
    /// shift[c]`.
    ///
    /// # Panics
    ///
    /// The lengths do not agree.
    pub fn interleave(
        out: &mut [f32],
        red: &[f32],
        green: &[f32],
        blue: &[f32],
        scale: [f32; 3],
        shift: [f32; 3],
    ) {
        let n = red.len();
        assert!(green.len() == n && blue.len() == n && out.len() == 3 * n);
        let planes = red.iter().zip(green).zip(blue);
        for (out, ((&red, &green), &blue)) in out.chunks_exact_mut(3).zip(planes) {
            out[0] = scale[0] * red + shift[0];
            out[1] = scale[1] * green + shift[1];
            out[2] = scale[2] * blue + shift[2];
        }
    }
}

dispatched! {
    /// `values[i] ← scale · values[i] + shift`.
    pub fn scale_and_shift(values: &mut [f32], scale: f32, shift: f32) {
        for value in values {
            *value = scale * *value + shift;
        }
    }
}

dispatched! {
    /// `values[i] ← scale · values[i] + shift`, held to `[0, 1]`.
    pub fn scale_and_shift_clamped(values: &mut [f32], scale: f32, shift: f32) {
        for value in values {
            *value = (scale * *value + shift).clamp(0., 1.);
        }
    }
}

/// Red, green and blue in grey: the weights of torchvision's `rgb_to_grayscale`.
pub const GREY: [f32; 3] = [0.2989, 0.587, 0.114];

#[inline(always)]
fn grey(red: f32, green: f32, blue: f32) -> f32 {
    GREY[0] * red + GREY[1] * green + GREY[2] * blue
}

dispatched! {
    /// Sum of the values, in an order that depends on their number alone.
    pub fn sum(values: &[f32]) -> f32 {
        let mut sums = [0f32; 16];
        let chunks = values.chunks_exact(16);
        let rest = chunks.remainder();
        for chunk in chunks {
            for (sum, &value) in sums.iter_mut().zip(chunk) {
                *sum += value;
            }
        }
        for (sum, &value) in sums.iter_mut().zip(rest) {
            *sum += value;
        }
        sums.iter().sum()
    }
}

dispatched! {
    /// Makes the three planes grey.
    pub fn to_grey(red: &mut [f32], green: &mut [f32], blue: &mut [f32]) {
        for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
            let grey = grey(*red, *green, *blue);
            (*red, *green, *blue) = (grey, grey, grey);
        }
    }
}

dispatched! {
    /// Mixes each pixel with its own grey: `factor · colour + (1 − factor) · grey`, held to `[0, 1]`.
    pub fn saturate(red: &mut [f32], green: &mut [f32], blue: &mut [f32], factor: f32) {
        for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
            let grey = (1. - factor) * grey(*red, *green, *blue);
            *red = (factor * *red + grey).clamp(0., 1.);
            *green = (factor * *green + grey).clamp(0., 1.);
            *blue = (factor * *blue + grey).clamp(0., 1.);
        }
    }
}

dispatched! {
    /// Turns the hue of each pixel by `turn` of the colour circle, keeping HSV saturation and value.
    pub fn turn_hue(red: &mut [f32], green: &mut [f32], blue: &mut [f32], turn: f32) {
        for ((red, green), blue) in red.iter_mut().zip(green).zip(blue) {
            let (r, g, b) = (*red, *green, *blue);
            let (high, low) = (r.max(g).max(b), r.min(g).min(b));
            let chroma = high - low;
            // The hue of grey is nothing; any finite number will do, as it is weighed by 0.
            let per_chroma = 1. / if chroma == 0. { 1. } else { chroma };
            let of_red = (g - b) * per_chroma;
            let of_green = 2. + (b - r) * per_chroma;
            let of_blue = 4. + (r - g) * per_chroma;
            let hue = if high == r { of_red } else if high == g { of_green } else { of_blue };
            let hue = hue + 6. * turn;
            *red = from_hue(hue + 5., high, chroma);
            *green = from_hue(hue + 3., high, chroma);
            *blue = from_hue(hue + 1., high, chroma);
        }
    }
}

/// A channel of a colour by its angle to the hue, in sixths of the circle.
#[inline(always)]
fn from_hue(angle: f32, high: f32, chroma: f32) -> f32 {
    let angle = angle - 6. * (angle * (1. / 6.)).floor();
    high - chroma * angle.min(4. - angle).clamp(0., 1.)
}

dispatched! {
    /// `values[i] ← values[i]^exponent` for values in `[0, 1]`, to about 10⁻⁶ of the value.
    pub fn power(values: &mut [f32], exponent: f32) {
        for value in values {
            *value = power_of(*value, exponent);
        }
    }
}

/// `x^y` for `x` in `[0, 1]` and `y > 0` by `2^(y log₂ x)`, without branches, so that it is the same
/// on every platform and can be vectorised.
#[inline(always)]
fn power_of(x: f32, y: f32) -> f32 {
    let normal = x.max(f32::MIN_POSITIVE);
    // x = 2^e · m with m in [√½, √2): subtracting the bits of √½ moves the exponent's boundary.
    const ROOT_HALF: i32 = 0x3f35_04f3;
    let bits = normal.to_bits() as i32;
    let exponent = (bits - ROOT_HALF) >> 23;
    let m = f32::from_bits((bits - (exponent << 23)) as u32);
    // log₂ m = 2/ln 2 · artanh(s) with s = (m − 1)/(m + 1), |s| < 0.172.
    let s = (m - 1.) / (m + 1.);
    let t = s * s;
    let series = 1. + t * (1. / 3. + t * (1. / 5. + t * (1. / 7. + t * (1. / 9.))));
    let log = exponent as f32 + s * series * (2. * std::f32::consts::LOG2_E);
    // 2^z = 2^n · 2^f with f in [−½, ½]; below 2^−126 the result is 0.
    let z = (y * log).max(-126.);
    let n = (z + 0.5).floor();
    let f = (z - n) * std::f32::consts::LN_2;
    let tail = 1. / 24. + f * (1. / 120. + f * (1. / 720. + f * (1. / 5040.)));
    let mantissa = 1. + f * (1. + f * (0.5 + f * (1. / 6. + f * tail)));
    let scale = f32::from_bits(((n as i32 + 127) << 23) as u32);
    if x < f32::MIN_POSITIVE { 0. } else { mantissa * scale }
}

dispatched! {
    /// `values[i] ← 1 − values[i]` where it is at least `threshold`.
    pub fn solarise(values: &mut [f32], threshold: f32) {
        for value in values {
            *value = if *value >= threshold { 1. - *value } else { *value };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values without pattern, of any number, in `[0, 1)`.
    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 + 13) % 1009) as f32 / 1009.).collect()
    }

    #[test]
    fn rows_of_bytes_and_of_floats_are_mixed_at_every_width() {
        for width in [1, 5, 63, 64, 65, 200] {
            let bytes: Vec<u8> = values(3 * (width + 4)).iter().map(|v| (v * 255.) as u8).collect();
            let weights = [0.5, -0.25, 2.];
            let want: Vec<f32> = (0..width)
                .map(|i| (0..3).map(|k| weights[k] * f32::from(bytes[k * (width + 4) + i])).sum())
                .collect();
            let mut out = vec![0.; width];
            mix_byte_rows(&mut out, &bytes, width + 4, &weights);
            assert_eq!(out, want);
            let floats: Vec<f32> = bytes.iter().map(|&byte| f32::from(byte)).collect();
            mix_rows(&mut out, &floats, &[0, width + 4, 2 * (width + 4)], &weights);
            assert_eq!(out, want);
        }
    }

    #[test]
    fn columns_are_mixed_alike_in_one_and_three_channels() {
        let row = values(3 * 9 + 1);
        let (starts, weights) = ([0, 4, 7], [0.5, 0.25, 1., -1., 2., 3.]);
        let mut colour = [[0.; 3]; 3];
        let [red, green, blue] = &mut colour;
        mix_colour_columns(red, green, blue, &row, &starts, &weights);
        for (channel, got) in colour.iter().enumerate() {
            let plane: Vec<f32> = row.iter().skip(channel).step_by(3).copied().collect();
            let mut want = [0.; 3];
            mix_columns(&mut want, &plane, &starts, &weights);
            assert_eq!(got, &want);
            assert_eq!(want[1], plane[4] - plane[5]);
        }
    }

    #[test]
    fn blurring_a_row_is_a_symmetric_convolution() {
        for width in [1, 64, 70] {
            let padded = values(width + 4);
            let kernel = [0.5, 0.2, 0.05];
            let mut out = vec![0.; width];
            blur_row(&mut out, &padded, &kernel);
            for (x, got) in out.iter().enumerate() {
                let want: f32 = [0.05, 0.2, 0.5, 0.2, 0.05]
                    .iter()
                    .zip(&padded[x..])
                    .map(|(weight, value)| weight * value)
                    .sum();
                assert!((got - want).abs() < 1e-6, "{width}, {x}: {got}, {want}");
            }
        }
    }

    #[test]
    fn planes_are_taken_apart_and_put_side_by_side() {
        let bytes: Vec<u8> = (0..60).collect();
        let planes: Vec<Vec<f32>> = (0..3)
            .map(|channel| {
                let mut plane = vec![0.; 20];
                plane_of_bytes(&mut plane, &bytes[channel..], 3, 0.5);
                plane
            })
            .collect();
        assert_eq!(planes[1][2], 3.5);
        let mut out = vec![0.; 60];
        let scale = [2., 4., 6.];
        interleave(&mut out, &planes[0], &planes[1], &planes[2], scale, [0., 1., 2.]);
        for (i, &got) in out.iter().enumerate() {
            assert_eq!(got, f32::from(bytes[i]) * 0.5 * scale[i % 3] + (i % 3) as f32);
        }
    }

    #[test]
    fn powers_are_those_of_the_standard_library() {
        for exponent in [0.3f32, 0.60653, 1., 1.64872, 5.] {
            let mut got = values(1009);
            got.extend([0., 1., 1e-30, f32::MIN_POSITIVE, 1e-40]);
            let before = got.clone();
            power(&mut got, exponent);
            for (x, got) in before.iter().zip(got) {
                let want = f64::from(*x).powf(f64::from(exponent));
                let tolerance = 2e-6 * want + 1e-11;
                assert!((f64::from(got) - want).abs() < tolerance, "{x}^{exponent}: {got}, {want}");
            }
        }
    }

    #[test]
    fn a_sum_has_every_value_once() {
        for n in [0u16, 1, 16, 17, 100] {
            let ones: Vec<f32> = (0..n).map(f32::from).collect();
            assert_eq!(sum(&ones), f32::from(n * n.saturating_sub(1) / 2));
        }
    }
}
