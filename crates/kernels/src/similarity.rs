//! Products of the rows of one matrix with the rows of another, a tile at a time.
//!
//! A search for the largest products (k-means, nearest neighbours) needs each product once, so the
//! matrix of products is never stored. [`products`] computes a [`Tile`]: [`LANES`] rows of one matrix,
//! packed in a [`Panel`], times [`GROUP`] rows of the other, packed in [`RowGroups`]. A tile is
//! approximate, with a proven [bound](Bound). The few products that the bound leaves undecided are then
//! computed by [`product`], whose result is the same on every processor. So the answer is exact for both
//! formats:
//!
//! - [`RowFormat::Bytes`]: rows rounded to 8 bits and multiplied as integers; four times as fast as
//!   floats on a processor with AVX-512 VNNI.
//! - [`RowFormat::Floats`]: the rows themselves.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use rayon::prelude::*;

use crate::Variant;
use crate::transpose::Interleaving;

/// Rows of a panel: three vectors of 16.
pub const LANES: usize = 48;

/// Rows of a group, one broadcast each: with three vectors, the 24 sums fill the registers.
pub const GROUP: usize = 8;

/// The format of rows in products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowFormat {
    /// Rows rounded to 8 bits, with one scale per row.
    Bytes,
    /// `f32`.
    Floats,
}

impl RowFormat {
    /// The format with the faster products on this processor.
    pub fn fastest() -> Self {
        if has_vnni() { Self::Bytes } else { Self::Floats }
    }
}

/// Rows of a matrix, prepared for products.
#[derive(Debug, Clone)]
pub struct Rows<'a> {
    values: &'a [f32],
    d: usize,
    /// The 8-bit numbers of each row, four per word; empty for floats.
    codes: Vec<u32>,
    /// The scale of each row's 8-bit numbers; empty for floats.
    scales: Vec<f32>,
    /// The length and rounding error of each row.
    pub extents: Vec<RowExtent>,
    format: RowFormat,
}

/// Upper bounds of a row's length and of its rounding error.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct RowExtent {
    /// `‖x‖`.
    pub length: f32,
    /// `‖x − x̂‖`; 0 for floats.
    pub error: f32,
}

impl RowExtent {
    /// The larger length and the larger error.
    pub fn max(self, other: Self) -> Self {
        Self { length: self.length.max(other.length), error: self.error.max(other.error) }
    }
}

impl<'a> Rows<'a> {
    /// Measures (and for bytes, rounds) the rows of `values` `(N, d)`, which must be finite.
    pub fn new(values: &'a [f32], d: usize, format: RowFormat) -> Self {
        let n = values.len() / d;
        let words = words(d, format);
        let (mut codes, mut scales) = match format {
            RowFormat::Bytes => (vec![0u32; n * words], vec![0f32; n]),
            RowFormat::Floats => (vec![], vec![]),
        };
        let mut extents = vec![RowExtent::default(); n];
        match format {
            RowFormat::Bytes => (values.par_chunks(d).zip(codes.par_chunks_mut(words)))
                .zip(scales.par_iter_mut().zip(&mut extents))
                .for_each(|((row, codes), (scale, extent))| {
                    (*scale, *extent) = round_row(row, codes);
                }),
            RowFormat::Floats => {
                (values.par_chunks(d).zip(&mut extents)).for_each(|(row, extent)| {
                    *extent = RowExtent { length: above(product(row, row).sqrt()), error: 0. };
                })
            }
        }
        Self { values, d, codes, scales, extents, format }
    }

    /// The number of rows.
    pub fn len(&self) -> usize {
        self.extents.len()
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// The format of the rows.
    pub fn format(&self) -> RowFormat {
        self.format
    }

    /// The largest length and the largest error over all rows.
    pub fn extent(&self) -> RowExtent {
        self.extents.iter().copied().fold(RowExtent::default(), RowExtent::max)
    }

    /// A word of a row: four codes, or a float.
    fn word(&self, row: usize, word: usize) -> u32 {
        match self.format {
            RowFormat::Bytes => self.codes[row * words(self.d, self.format) + word],
            RowFormat::Floats => self.values[row * self.d + word].to_bits(),
        }
    }
}

/// Bounds the error of the products in a tile.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    other: RowExtent,
    rounding: f32,
    largest_minus: f32,
}

impl Bound {
    /// For products with the rows of `other`, with subtrahends of at most `largest_minus` in magnitude.
    pub fn new(other: &Rows, largest_minus: f32) -> Self {
        // Bytes: integer sums are exact; a conversion, two scalings and a difference are rounded.
        // Floats: one rounding per term, and the difference.
        let roundings = match other.format {
            RowFormat::Bytes => 8.,
            RowFormat::Floats => other.d as f32 + 2.,
        };
        Self { other: other.extent(), rounding: 1.1 * roundings * f32::EPSILON, largest_minus }
    }

    /// The largest error of a product of a row of this extent with any of the others.
    pub fn of(&self, row: RowExtent) -> f32 {
        let other = self.other.length + self.other.error;
        let rounded = row.length * self.other.error + row.error * other;
        let size = (row.length + row.error) * other + self.largest_minus;
        (rounded + self.rounding * size) * (1. + 1e-5) + f32::MIN_POSITIVE
    }
}

/// Words per row: a word holds four 8-bit numbers.
fn words(d: usize, format: RowFormat) -> usize {
    match format {
        RowFormat::Bytes => d.div_ceil(4),
        RowFormat::Floats => d,
    }
}

/// An `f32` that is not below `x`.
fn above(x: f64) -> f32 {
    (x * (1. + 1e-6)) as f32
}

/// A cache line, for aligned loads.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct CacheLine([u32; 16]);

/// Vectors of 16 lanes.
const VECTORS: usize = LANES / 16;

/// Up to [`LANES`] interleaved rows: word 0 of all, word 1 of all, and so on.
#[derive(Debug, Clone)]
pub struct Panel {
    lines: Vec<CacheLine>,
    scales: [f32; LANES],
    format: RowFormat,
}

impl Panel {
    /// An empty panel for rows of width `d`.
    pub fn new(d: usize, format: RowFormat) -> Self {
        let lines = vec![CacheLine([0; 16]); VECTORS * words(d, format)];
        Self { lines, scales: [0.; LANES], format }
    }

    /// Packs up to [`LANES`] rows, in the order of the indices; products of unused lanes are 0.
    pub fn fill(&mut self, rows: &Rows, indices: impl ExactSizeIterator<Item = usize>) {
        assert!(indices.len() <= LANES && rows.format == self.format);
        let words = words(rows.d, self.format);
        assert_eq!(self.lines.len(), VECTORS * words);
        let (mut taken, count) = ([0; LANES], indices.len());
        taken.iter_mut().zip(indices).for_each(|(to, index)| *to = index);
        self.scales = std::array::from_fn(|lane| {
            let scale = rows.scales.get(taken[lane]).filter(|_| lane < count);
            scale.copied().unwrap_or(0.)
        });
        let source: &[u32] = match self.format {
            RowFormat::Bytes => &rows.codes,
            RowFormat::Floats => as_words(rows.values),
        };
        for (vector, taken) in taken.chunks(16).enumerate() {
            let count = count.saturating_sub(16 * vector).min(16);
            let start = |lane: usize| taken[lane] * words;
            let place = |word| word * VECTORS + vector;
            let lanes = as_lanes(&mut self.lines);
            Interleaving { count, len: words, start, place }.rows_to_lanes(
                Variant::fastest(),
                source,
                lanes,
            );
            for line in self.lines[vector..].iter_mut().step_by(VECTORS) {
                if self.format == RowFormat::Bytes {
                    // Bytes are unsigned on this side: 128 is added here and subtracted by the groups.
                    line.0.iter_mut().for_each(|word| *word ^= 0x8080_8080);
                }
                line.0[count..].fill(0);
            }
        }
    }
}

/// All rows of a matrix in groups of [`GROUP`], interleaved: word 0 of the group, word 1, and so on.
#[derive(Debug, Clone)]
pub struct RowGroups {
    words: Vec<u32>,
    /// For bytes, what undoes the 128 that panels add: `−128 Σ codes`.
    offsets: Vec<i32>,
    scales: Vec<f32>,
    /// Subtracted from each product; infinite for the rows that pad the last group.
    minus: Vec<f32>,
    width: usize,
    format: RowFormat,
}

impl RowGroups {
    /// Packs all rows. `minus` is subtracted from the products: one number per row, or empty.
    pub fn new(rows: &Rows, minus: &[f32]) -> Self {
        let width = words(rows.d, rows.format);
        let n = rows.len();
        assert!(minus.is_empty() || minus.len() == n);
        let padded = n.div_ceil(GROUP) * GROUP;
        let mut packed = vec![0u32; padded * width];
        packed.par_chunks_mut(width.max(1) * GROUP).enumerate().for_each(|(group, words)| {
            for j in 0..GROUP.min(n - group * GROUP) {
                for word in 0..width {
                    words[word * GROUP + j] = rows.word(group * GROUP + j, word);
                }
            }
        });
        let mut offsets = vec![0i32; padded];
        for (offset, codes) in offsets.iter_mut().zip(rows.codes.chunks(width.max(1))) {
            let sum: i32 =
                codes.iter().flat_map(|w| w.to_le_bytes()).map(|b| i32::from(b as i8)).sum();
            *offset = -128 * sum;
        }
        let mut scales = rows.scales.clone();
        scales.resize(padded, 0.);
        let mut all_minus = if minus.is_empty() { vec![0.; n] } else { minus.to_vec() };
        all_minus.resize(padded, f32::INFINITY);
        Self { words: packed, offsets, scales, minus: all_minus, width, format: rows.format }
    }

    /// The number of groups.
    pub fn len(&self) -> usize {
        self.minus.len() / GROUP
    }

    /// Whether there are no groups.
    pub fn is_empty(&self) -> bool {
        self.minus.is_empty()
    }
}

/// The products of a panel with a group, minus the group's subtrahends.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub struct Tile {
    /// `(GROUP, LANES)`; `−∞` for the padding of the last group.
    pub products: [f32; GROUP * LANES],
    /// The largest product of each lane.
    pub largest: [f32; LANES],
}

impl Default for Tile {
    fn default() -> Self {
        Self { products: [0.; GROUP * LANES], largest: [0.; LANES] }
    }
}

impl Tile {
    /// The products of row `j` of the group with all lanes.
    pub fn row(&self, j: usize) -> &[f32; LANES] {
        self.products[j * LANES..].first_chunk().expect("a row has LANES products")
    }
}

/// The lanes that reach their threshold, as bits from the lowest.
pub fn reached(values: &[f32; LANES], thresholds: &[f32; LANES]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the processor has AVX-512.
        return unsafe { reached_avx512(values, thresholds) };
    }
    let bit = |lane: usize| u64::from(values[lane] >= thresholds[lane]) << lane;
    (0..LANES).map(bit).sum()
}

/// The rows of the tile with a lane that reaches the row's threshold, as bits.
pub fn rows_reached(tile: &Tile, thresholds: &[f32; GROUP]) -> u8 {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the processor has AVX-512.
        return unsafe { rows_reached_avx512(tile, thresholds) };
    }
    let any = |j: usize| tile.row(j).iter().any(|&x| x >= thresholds[j]);
    (0..GROUP).map(|j| u8::from(any(j)) << j).sum()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn rows_reached_avx512(tile: &Tile, thresholds: &[f32; GROUP]) -> u8 {
    let mut rows = 0u8;
    for (j, &threshold) in thresholds.iter().enumerate() {
        let row = tile.products[j * LANES..][..LANES].as_ptr();
        // SAFETY: a row has three vectors.
        let [a, b, c] = std::array::from_fn(|v| unsafe { _mm512_loadu_ps(row.add(16 * v)) });
        let largest = _mm512_max_ps(_mm512_max_ps(a, b), c);
        let reached = _mm512_cmp_ps_mask::<_CMP_GE_OQ>(largest, _mm512_set1_ps(threshold));
        rows |= u8::from(reached != 0) << j;
    }
    rows
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn reached_avx512(values: &[f32; LANES], thresholds: &[f32; LANES]) -> u64 {
    let mut bits = 0u64;
    for vector in 0..VECTORS {
        // SAFETY: both arrays have 16 values from this offset on.
        let (x, t) = unsafe {
            (
                _mm512_loadu_ps(values.as_ptr().add(16 * vector)),
                _mm512_loadu_ps(thresholds.as_ptr().add(16 * vector)),
            )
        };
        bits |= u64::from(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, t)) << (16 * vector);
    }
    bits
}

/// Computes the products of all lanes of `panel` with one group of `groups`.
pub fn products(panel: &Panel, groups: &RowGroups, group: usize, tile: &mut Tile) {
    assert_eq!(panel.format, groups.format);
    let input = TileInput {
        lines: &panel.lines,
        lane_scales: &panel.scales,
        words: &groups.words[group * GROUP * groups.width..][..GROUP * groups.width],
        offsets: groups.offsets[group * GROUP..].first_chunk().expect("groups are full"),
        scales: groups.scales.get(group * GROUP..).and_then(<[f32]>::first_chunk),
        minus: groups.minus[group * GROUP..].first_chunk().expect("groups are full"),
    };
    assert_eq!(input.lines.len(), VECTORS * groups.width);
    match panel.format {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has AVX-512 VNNI, and the lengths were checked.
        RowFormat::Bytes if has_vnni() => unsafe { bytes_vnni(&input, tile) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has AVX-512, and the lengths were checked.
        RowFormat::Floats if has_avx512() => unsafe { floats_avx512(&input, tile) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the processor has AVX2 and FMA.
        RowFormat::Floats if has_avx2() => unsafe { floats_avx2(&input, tile) },
        RowFormat::Bytes => bytes_portable(&input, tile),
        RowFormat::Floats => floats_portable(&input, tile),
    }
}

/// A panel and a group of checked lengths.
struct TileInput<'a> {
    lines: &'a [CacheLine],
    lane_scales: &'a [f32; LANES],
    words: &'a [u32],
    offsets: &'a [i32; GROUP],
    scales: Option<&'a [f32; GROUP]>,
    minus: &'a [f32; GROUP],
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn bytes_vnni(input: &TileInput, tile: &mut Tile) {
    let mut sums = [[_mm512_setzero_si512(); VECTORS]; GROUP];
    for (sums, &offset) in sums.iter_mut().zip(input.offsets) {
        *sums = [_mm512_set1_epi32(offset); VECTORS];
    }
    let (mut line, mut word) = (input.lines.as_ptr(), input.words.as_ptr());
    for _ in 0..input.words.len() / GROUP {
        // SAFETY: there are VECTORS lines and GROUP words for each step, as `products` checked.
        unsafe {
            let lanes: [__m512i; VECTORS] =
                std::array::from_fn(|v| _mm512_load_si512(line.add(v).cast()));
            for (j, sums) in sums.iter_mut().enumerate() {
                let broadcast = _mm512_set1_epi32((*word.add(j)).cast_signed());
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm512_dpbusd_epi32(*sum, lanes, broadcast);
                }
            }
            line = line.add(VECTORS);
            word = word.add(GROUP);
        }
    }
    let scales = input.scales.expect("bytes have scales");
    let mut largest = [_mm512_set1_ps(f32::NEG_INFINITY); VECTORS];
    for (j, sums) in sums.iter().enumerate() {
        for (vector, &sum) in sums.iter().enumerate() {
            // SAFETY: the arrays have 16 values from these offsets on.
            unsafe {
                let lane_scales = _mm512_loadu_ps(input.lane_scales.as_ptr().add(16 * vector));
                let scale = _mm512_mul_ps(lane_scales, _mm512_set1_ps(scales[j]));
                let product = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scale);
                let value = _mm512_sub_ps(product, _mm512_set1_ps(input.minus[j]));
                largest[vector] = _mm512_max_ps(largest[vector], value);
                _mm512_store_ps(tile.products.as_mut_ptr().add(j * LANES + 16 * vector), value);
            }
        }
    }
    store_largest(&largest, tile);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn store_largest(largest: &[__m512; VECTORS], tile: &mut Tile) {
    for (vector, &value) in largest.iter().enumerate() {
        // SAFETY: the array has 16 values from this offset on.
        unsafe { _mm512_storeu_ps(tile.largest.as_mut_ptr().add(16 * vector), value) };
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn floats_avx512(input: &TileInput, tile: &mut Tile) {
    let mut sums = [[_mm512_setzero_ps(); VECTORS]; GROUP];
    let (mut line, mut word) = (input.lines.as_ptr(), input.words.as_ptr());
    for _ in 0..input.words.len() / GROUP {
        // SAFETY: there are VECTORS lines and GROUP words for each step, as `products` checked.
        unsafe {
            let lanes: [__m512; VECTORS] =
                std::array::from_fn(|v| _mm512_load_ps(line.add(v).cast()));
            for (j, sums) in sums.iter_mut().enumerate() {
                let broadcast = _mm512_set1_ps(f32::from_bits(*word.add(j)));
                for (sum, lanes) in sums.iter_mut().zip(lanes) {
                    *sum = _mm512_fmadd_ps(lanes, broadcast, *sum);
                }
            }
            line = line.add(VECTORS);
            word = word.add(GROUP);
        }
    }
    let mut largest = [_mm512_set1_ps(f32::NEG_INFINITY); VECTORS];
    for (j, sums) in sums.iter().enumerate() {
        for (vector, &sum) in sums.iter().enumerate() {
            let value = _mm512_sub_ps(sum, _mm512_set1_ps(input.minus[j]));
            largest[vector] = _mm512_max_ps(largest[vector], value);
            // SAFETY: the array has 16 values from this offset on.
            unsafe {
                _mm512_store_ps(tile.products.as_mut_ptr().add(j * LANES + 16 * vector), value)
            };
        }
    }
    store_largest(&largest, tile);
}

/// Computes two rows of the group at a time: their 12 sums of 8 lanes, with what they are made of, fill the
/// registers.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn floats_avx2(input: &TileInput, tile: &mut Tile) {
    const HALVES: usize = 2 * VECTORS;
    let mut largest = [_mm256_set1_ps(f32::NEG_INFINITY); HALVES];
    for j in (0..GROUP).step_by(2) {
        let mut sums = [[_mm256_setzero_ps(); HALVES]; 2];
        let (mut line, mut word) = (input.lines.as_ptr(), input.words.as_ptr());
        for _ in 0..input.words.len() / GROUP {
            // SAFETY: there are VECTORS lines and GROUP words for each step, as `products` checked.
            unsafe {
                let rows = [0, 1].map(|i| _mm256_set1_ps(f32::from_bits(*word.add(j + i))));
                for half in 0..HALVES {
                    let lanes = _mm256_load_ps(line.cast::<f32>().add(8 * half));
                    for (sums, &row) in sums.iter_mut().zip(&rows) {
                        sums[half] = _mm256_fmadd_ps(lanes, row, sums[half]);
                    }
                }
                line = line.add(VECTORS);
                word = word.add(GROUP);
            }
        }
        for (i, sums) in sums.iter().enumerate() {
            let minus = _mm256_set1_ps(input.minus[j + i]);
            for (half, &sum) in sums.iter().enumerate() {
                let value = _mm256_sub_ps(sum, minus);
                largest[half] = _mm256_max_ps(largest[half], value);
                // SAFETY: a row of the tile has LANES values.
                unsafe {
                    let to = tile.products.as_mut_ptr().add((j + i) * LANES + 8 * half);
                    _mm256_storeu_ps(to, value);
                }
            }
        }
    }
    for (half, &value) in largest.iter().enumerate() {
        // SAFETY: there are LANES values.
        unsafe { _mm256_storeu_ps(tile.largest.as_mut_ptr().add(8 * half), value) };
    }
}

/// Computes two rows of the group and 16 lanes at a time, which the compiler keeps in registers.
fn floats_portable(input: &TileInput, tile: &mut Tile) {
    for vector in 0..VECTORS {
        for j in (0..GROUP).step_by(2) {
            let mut sums = [[0f32; 16]; 2];
            let lines = input.lines.iter().skip(vector).step_by(VECTORS);
            for (line, words) in lines.zip(input.words.chunks_exact(GROUP)) {
                let rows = [f32::from_bits(words[j]), f32::from_bits(words[j + 1])];
                let [first, second] = &mut sums;
                for ((&lane, first), second) in line.0.iter().zip(first).zip(second) {
                    *first += f32::from_bits(lane) * rows[0];
                    *second += f32::from_bits(lane) * rows[1];
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                let row = &mut tile.products[(j + i) * LANES + 16 * vector..][..16];
                row.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum - input.minus[j + i]);
            }
        }
    }
    fill_largest(tile);
}

fn bytes_portable(input: &TileInput, tile: &mut Tile) {
    let scales = input.scales.expect("bytes have scales");
    for j in 0..GROUP {
        let mut sums = [input.offsets[j]; LANES];
        for (lines, words) in input.lines.chunks_exact(VECTORS).zip(input.words.chunks_exact(GROUP))
        {
            let broadcast = words[j].to_le_bytes();
            for (lane, sum) in sums.iter_mut().enumerate() {
                let bytes = lines[lane / 16].0[lane % 16].to_le_bytes();
                for (byte, other) in bytes.into_iter().zip(broadcast) {
                    *sum += i32::from(byte) * i32::from(other as i8);
                }
            }
        }
        for (lane, &sum) in sums.iter().enumerate() {
            let scale = input.lane_scales[lane] * scales[j];
            tile.products[j * LANES + lane] = sum as f32 * scale - input.minus[j];
        }
    }
    fill_largest(tile);
}

fn fill_largest(tile: &mut Tile) {
    tile.largest = [f32::NEG_INFINITY; LANES];
    for row in tile.products.chunks_exact(LANES) {
        tile.largest.iter_mut().zip(row).for_each(|(largest, &x)| *largest = largest.max(x));
    }
}

/// Rounds a row to 8 bits and returns its scale and extent.
fn round_row(row: &[f32], codes: &mut [u32]) -> (f32, RowExtent) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the processor has AVX-512.
        return unsafe { round_row_avx512(row, codes) };
    }
    round_row_portable(row, codes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn round_row_avx512(row: &[f32], codes: &mut [u32]) -> (f32, RowExtent) {
    round_row_portable(row, codes)
}

#[inline(always)]
fn round_row_portable(row: &[f32], codes: &mut [u32]) -> (f32, RowExtent) {
    const WIDE: usize = 16;
    let mut largest = [0f32; WIDE];
    for part in row.chunks(WIDE) {
        largest.iter_mut().zip(part).for_each(|(most, x)| *most = most.max(x.abs()));
    }
    let largest = largest.into_iter().fold(0., f32::max);
    let length = above(product(row, row).sqrt());
    // If the scale cannot be inverted, the row becomes 0 and its length is the error.
    let scale = largest / 127.;
    let inverse = 1. / scale;
    if !inverse.is_finite() {
        codes.fill(0);
        return (0., RowExtent { length, error: length });
    }
    let mut squares = [0f32; WIDE];
    for (part, codes) in row.chunks(WIDE).zip(codes.chunks_mut(WIDE / 4)) {
        let mut numbers = [0i8; WIDE];
        for ((&x, number), square) in part.iter().zip(&mut numbers).zip(&mut squares) {
            let rounded = (x * inverse).round_ties_even();
            *number = rounded as i8;
            // In units of the scale, so that the squares of tiny rows do not underflow.
            let error = x * inverse - rounded;
            *square += error * error;
        }
        for (code, numbers) in codes.iter_mut().zip(numbers.as_chunks::<4>().0) {
            *code = u32::from_le_bytes(numbers.map(|number| number as u8));
        }
    }
    let squares: f32 = squares.iter().sum();
    // The second term covers the rounding of `x · inverse`.
    let error = f64::from(squares).sqrt() * f64::from(scale) * (1. + 1e-4);
    (scale, RowExtent { length, error: above(error + f64::from(length) * 1e-6) })
}

/// `Σ x·y` in `f64`, with the same bits on every processor.
///
/// Products of two `f32` are exact in `f64`. They are added to 32 sums, which are then added in pairs.
pub fn product(x: &[f32], y: &[f32]) -> f64 {
    assert_eq!(x.len(), y.len());
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the processor has AVX-512.
        return unsafe { product_avx512(x, y) };
    }
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: the processor has AVX2.
        return unsafe { product_avx2(x, y) };
    }
    product_portable(x, y)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn product_avx512(x: &[f32], y: &[f32]) -> f64 {
    product_portable(x, y)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn product_avx2(x: &[f32], y: &[f32]) -> f64 {
    product_portable(x, y)
}

#[inline(always)]
fn product_portable(x: &[f32], y: &[f32]) -> f64 {
    const WIDE: usize = 32;
    let mut sums = [0f64; WIDE];
    let (x_parts, x_rest) = x.as_chunks::<WIDE>();
    let (y_parts, y_rest) = y.as_chunks::<WIDE>();
    for (x, y) in x_parts.iter().zip(y_parts) {
        for ((sum, &x), &y) in sums.iter_mut().zip(x).zip(y) {
            *sum += f64::from(x) * f64::from(y);
        }
    }
    for ((sum, &x), &y) in sums.iter_mut().zip(x_rest).zip(y_rest) {
        *sum += f64::from(x) * f64::from(y);
    }
    let mut width = WIDE / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

/// `Σ (x − y)²` in `f32`: fast and approximate.
pub fn squared_distance(x: &[f32], y: &[f32]) -> f32 {
    assert_eq!(x.len(), y.len());
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the processor has AVX-512.
        return unsafe { squared_distance_avx512(x, y) };
    }
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: the processor has AVX2.
        return unsafe { squared_distance_avx2(x, y) };
    }
    squared_distance_portable(x, y)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn squared_distance_avx512(x: &[f32], y: &[f32]) -> f32 {
    squared_distance_portable(x, y)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn squared_distance_avx2(x: &[f32], y: &[f32]) -> f32 {
    squared_distance_portable(x, y)
}

#[inline(always)]
fn squared_distance_portable(x: &[f32], y: &[f32]) -> f32 {
    const WIDE: usize = 64;
    let mut sums = [0f32; WIDE];
    let (x_parts, x_rest) = x.as_chunks::<WIDE>();
    let (y_parts, y_rest) = y.as_chunks::<WIDE>();
    for (x, y) in x_parts.iter().zip(y_parts) {
        for ((sum, &x), &y) in sums.iter_mut().zip(x).zip(y) {
            *sum += (x - y) * (x - y);
        }
    }
    for ((sum, &x), &y) in sums.iter_mut().zip(x_rest).zip(y_rest) {
        *sum += (x - y) * (x - y);
    }
    sums.iter().sum()
}

/// `sums += factor · row`, in `f64`.
pub fn add_row(sums: &mut [f64], row: &[f32], factor: f64) {
    #[cfg(target_arch = "x86_64")]
    if has_avx512() {
        // SAFETY: the processor has AVX-512.
        return unsafe { add_row_avx512(sums, row, factor) };
    }
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // SAFETY: the processor has AVX2.
        return unsafe { add_row_avx2(sums, row, factor) };
    }
    add_row_portable(sums, row, factor);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn add_row_avx512(sums: &mut [f64], row: &[f32], factor: f64) {
    add_row_portable(sums, row, factor);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn add_row_avx2(sums: &mut [f64], row: &[f32], factor: f64) {
    add_row_portable(sums, row, factor);
}

#[inline(always)]
fn add_row_portable(sums: &mut [f64], row: &[f32], factor: f64) {
    sums.iter_mut().zip(row).for_each(|(sum, &x)| *sum += factor * f64::from(x));
}

fn as_lanes(lines: &mut [CacheLine]) -> &mut [u32] {
    // SAFETY: a line is 16 words without padding, and any bits are valid; the borrow is passed on.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), 16 * lines.len()) }
}

fn as_words(values: &[f32]) -> &[u32] {
    // SAFETY: both types have size and alignment 4, and any bits are valid.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), values.len()) }
}

fn has_vnni() -> bool {
    #[cfg(target_arch = "x86_64")]
    return has_avx512() && is_x86_feature_detected!("avx512vnni");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pseudo-random numbers in `[−1, 1)`, with some rows scaled up or down.
    fn matrix(n: usize, d: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.
        };
        (0..n * d).map(|i| next() * [1., 100., 1e-3][i / d % 3]).collect()
    }

    #[test]
    fn every_processor_gives_the_same_bits() {
        for d in [3, 32, 77, 384] {
            let (x, y) = (matrix(1, d, 1), matrix(1, d, 2));
            assert_eq!(product(&x, &y).to_bits(), product_portable(&x, &y).to_bits());
            let distances = [squared_distance(&x, &y), squared_distance_portable(&x, &y)];
            assert_eq!(distances[0].to_bits(), distances[1].to_bits());
            let mut sums = [vec![0.1; d], vec![0.1; d]];
            add_row(&mut sums[0], &x, 0.3);
            add_row_portable(&mut sums[1], &x, 0.3);
            assert_eq!(sums[0], sums[1]);
        }
    }

    #[test]
    fn every_tile_lies_within_its_bound() {
        for format in [RowFormat::Bytes, RowFormat::Floats] {
            for (n, m, d) in [(48, 8, 512), (50, 13, 37), (1, 1, 1), (100, 9, 4)] {
                let (x, y) = (matrix(n, d, 1), matrix(m, d, 2));
                let (x_rows, y_rows) = (Rows::new(&x, d, format), Rows::new(&y, d, format));
                let minus: Vec<f32> = (0..m).map(|j| j as f32 * 0.5).collect();
                let groups = RowGroups::new(&y_rows, &minus);
                let bound = Bound::new(&y_rows, minus.iter().copied().fold(0., f32::max));
                let mut panel = Panel::new(d, format);
                let (mut tile, mut used) = (Tile::default(), 0f64);
                for first in (0..n).step_by(LANES) {
                    let lanes = LANES.min(n - first);
                    // In reverse order, to check the order of the lanes.
                    panel.fill(&x_rows, (0..lanes).map(|lane| first + lanes - 1 - lane));
                    for group in 0..groups.len() {
                        products(&panel, &groups, group, &mut tile);
                        for lane in 0..lanes {
                            let i = first + lanes - 1 - lane;
                            let mut largest = f32::NEG_INFINITY;
                            for j in 0..GROUP {
                                let got = tile.row(j)[lane];
                                largest = largest.max(got);
                                let k = group * GROUP + j;
                                if k >= m {
                                    assert_eq!(got, f32::NEG_INFINITY);
                                    continue;
                                }
                                let want = product(&x[i * d..][..d], &y[k * d..][..d])
                                    - f64::from(minus[k]);
                                let allowed = f64::from(bound.of(x_rows.extents[i]));
                                let off = (f64::from(got) - want).abs();
                                assert!(off <= allowed, "{format:?} {i} {k}: {off} > {allowed}");
                                used = used.max(off / allowed);
                            }
                            assert_eq!(tile.largest[lane], largest);
                        }
                    }
                }
                assert!(format == RowFormat::Floats || used > 1e-3, "the bound is useless: {used}");
            }
        }
    }

    #[test]
    fn portable_tiles_equal_those_of_the_processor() {
        let (x, y, d) = (matrix(48, 70, 3), matrix(8, 70, 4), 70);
        for format in [RowFormat::Bytes, RowFormat::Floats] {
            let (x_rows, y_rows) = (Rows::new(&x, d, format), Rows::new(&y, d, format));
            let groups = RowGroups::new(&y_rows, &[]);
            let mut panel = Panel::new(d, format);
            panel.fill(&x_rows, 0..48);
            let mut fast = Tile::default();
            products(&panel, &groups, 0, &mut fast);
            let input = TileInput {
                lines: &panel.lines,
                lane_scales: &panel.scales,
                words: &groups.words,
                offsets: groups.offsets.first_chunk().expect("one group"),
                scales: groups.scales.first_chunk(),
                minus: groups.minus.first_chunk().expect("one group"),
            };
            let mut plain = Tile::default();
            match format {
                RowFormat::Bytes => bytes_portable(&input, &mut plain),
                RowFormat::Floats => floats_portable(&input, &mut plain),
            }
            #[cfg(target_arch = "x86_64")]
            if format == RowFormat::Floats && has_avx2() && has_avx512() {
                let mut narrow = Tile::default();
                // SAFETY: the processor has AVX2 and FMA.
                unsafe { floats_avx2(&input, &mut narrow) };
                assert_eq!(narrow.products, fast.products);
                assert_eq!(narrow.largest, fast.largest);
            }
            let bound = Bound::new(&y_rows, 0.);
            for (i, (fast, plain)) in fast.products.iter().zip(&plain.products).enumerate() {
                // Bytes differ only by the order of the scalings.
                let allowed = match format {
                    RowFormat::Bytes => plain.abs() * 1e-6,
                    RowFormat::Floats => bound.of(x_rows.extents[i % LANES]),
                };
                assert!((fast - plain).abs() <= allowed, "{format:?} {fast} {plain}");
            }
        }
    }

    #[test]
    fn the_error_of_a_row_that_cannot_be_scaled_is_its_length() {
        let x = [0f32, 0., 1e-40, -1e-41];
        let rows = Rows::new(&x, 2, RowFormat::Bytes);
        assert_eq!(rows.extents[0], RowExtent { length: 0., error: 0. });
        assert!(rows.extents[1].error >= 1e-40);
        assert_eq!(rows.len(), 2);
    }

    #[test]
    fn products_and_sums_are_correct_at_every_width() {
        for d in [1, 31, 32, 33, 100] {
            let (x, y) = (matrix(1, d, 5), matrix(1, d, 6));
            let want: f64 = x.iter().zip(&y).map(|(&x, &y)| f64::from(x) * f64::from(y)).sum();
            assert!((product(&x, &y) - want).abs() < 1e-13 * d as f64);
            assert_eq!(product(&x, &y).to_bits(), product_portable(&x, &y).to_bits());
            let squares = x.iter().zip(&y).map(|(&x, &y)| (f64::from(x) - f64::from(y)).powi(2));
            let (want, got) = (squares.sum::<f64>(), f64::from(squared_distance(&x, &y)));
            assert!((got - want).abs() < 1e-6 * want, "{got} {want}");
            let mut sums = vec![1f64; d];
            add_row(&mut sums, &x, -2.);
            assert!(sums.iter().zip(&x).all(|(s, &x)| *s == 1. - 2. * f64::from(x)));
        }
    }

    #[test]
    fn thresholds_are_reached_lane_by_lane() {
        let values: [f32; LANES] = std::array::from_fn(|i| i as f32);
        let thresholds: [f32; LANES] =
            std::array::from_fn(|i| if i % 3 == 0 { i as f32 } else { 99. });
        let want: u64 = (0..LANES).step_by(3).map(|i| 1 << i).sum();
        assert_eq!(reached(&values, &thresholds), want);

        let mut tile = Tile::default();
        tile.products[3 * LANES + 47] = 2.;
        tile.products[5 * LANES] = 1.;
        assert_eq!(rows_reached(&tile, &[1.; GROUP]), 0b0010_1000);
        assert_eq!(rows_reached(&tile, &[2.; GROUP]), 0b0000_1000);
    }
}
