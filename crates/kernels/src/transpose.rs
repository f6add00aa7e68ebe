//! Rows of numbers interleaved to rows of 16 lanes, and back: weights as they are stored, `(O, I, K, K)`, and
//! as tiles hold them; points, and the panels that products take.
#![cfg_attr(
    target_arch = "x86_64",
    expect(unsafe_code, reason = "vector intrinsics, on addresses that are checked once")
)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{_mm256_loadu_ps as load, *};
use std::ops::Range;

use crate::Variant;
use crate::layout::{SIDE, TILE};

/// Numbers on each side of the blocks that registers transpose.
const BLOCK: usize = 8;

/// Transposes tiles.
///
/// # Panics
///
/// If `to` is shorter than `from`.
pub(crate) fn transpose_tiles(variant: Variant, from: &[f32], to: &mut [f32]) {
    let (start, place) = (|row| row * SIDE, |column| column);
    let tile = Interleaving { count: SIDE, len: SIDE, start, place };
    for (from, to) in from.chunks(TILE).zip(to[..from.len()].chunks_mut(TILE)) {
        tile.rows_to_lanes(variant, from, to);
    }
}

/// Up to 16 rows of one slice, and the places of their numbers in another: number `c` of row `r` is lane
/// `r` of row `place(c)` of 16 lanes.
pub(crate) struct Interleaving<Start, Place> {
    /// How many rows: at most 16, one for each lane.
    pub count: usize,
    /// Numbers in each.
    pub len: usize,
    /// Where row `r` begins.
    pub start: Start,
    /// The row of lanes for number `c` of each row.
    pub place: Place,
}

/// A number of 4 bytes, any of which are valid.
pub(crate) trait Word: Copy {}

impl Word for f32 {}
impl Word for u32 {}

impl<Start: Fn(usize) -> usize, Place: Fn(usize) -> usize> Interleaving<Start, Place> {
    /// Writes the rows of `from` to the lanes of `to`; other lanes stay as they are.
    ///
    /// # Panics
    ///
    /// If a row or a place lies outside its slice.
    pub fn rows_to_lanes<T: Word>(&self, variant: Variant, from: &[T], to: &mut [T]) {
        self.check(from.len());
        #[cfg(target_arch = "x86_64")]
        if variant != Variant::PORTABLE {
            // SAFETY: every variant but the portable one has AVX2; the rows are inside (checked above).
            return unsafe { self.rows_to_lanes_avx2(from, to) };
        }
        let _ = variant;
        self.blocks(|lanes, columns| self.spread(from, to, lanes, columns));
    }

    /// The way back: adds the lanes of `from` to the rows of `to`.
    ///
    /// # Panics
    ///
    /// If a row or a place lies outside its slice.
    pub fn add_lanes_to_rows(&self, variant: Variant, from: &[f32], to: &mut [f32]) {
        self.check(to.len());
        #[cfg(target_arch = "x86_64")]
        if variant != Variant::PORTABLE {
            // SAFETY: as in `rows_to_lanes`.
            return unsafe { self.add_lanes_to_rows_avx2(from, to) };
        }
        let _ = variant;
        self.blocks(|lanes, columns| self.add_back(from, to, lanes, columns));
    }

    /// # Panics
    ///
    /// If there are more than 16 rows, or one exceeds a slice of `outside` numbers.
    fn check(&self, outside: usize) {
        assert!(self.count <= SIDE, "{} rows for 16 lanes", self.count);
        for row in 0..self.count {
            let start = (self.start)(row);
            assert!(
                start <= outside && self.len <= outside - start,
                "row {row} of {outside} numbers"
            );
        }
    }

    /// Calls `work(lanes, columns)` for blocks of at most 8 × 8 numbers.
    #[inline(always)]
    fn blocks(&self, mut work: impl FnMut(Range<usize>, Range<usize>)) {
        for lane in (0..self.count).step_by(BLOCK) {
            for column in (0..self.len).step_by(BLOCK) {
                let lanes = lane..(lane + BLOCK).min(self.count);
                work(lanes, column..(column + BLOCK).min(self.len));
            }
        }
    }

    #[inline(always)]
    fn spread<T: Word>(
        &self,
        from: &[T],
        to: &mut [T],
        lanes: Range<usize>,
        columns: Range<usize>,
    ) {
        for column in columns {
            let to = &mut to[(self.place)(column) * SIDE..][..SIDE];
            for lane in lanes.clone() {
                to[lane] = from[(self.start)(lane) + column];
            }
        }
    }

    #[inline(always)]
    fn add_back(&self, from: &[f32], to: &mut [f32], lanes: Range<usize>, columns: Range<usize>) {
        for column in columns {
            let from = &from[(self.place)(column) * SIDE..][..SIDE];
            for lane in lanes.clone() {
                to[(self.start)(lane) + column] += from[lane];
            }
        }
    }

    /// # Safety
    ///
    /// The processor has AVX2, and the rows lie in `from`.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    unsafe fn rows_to_lanes_avx2<T: Word>(&self, from: &[T], to: &mut [T]) {
        self.blocks(|lanes, columns| {
            if lanes.len() < BLOCK || columns.len() < BLOCK {
                return self.spread(from, to, lanes, columns);
            }
            let mut block = [_mm256_setzero_ps(); BLOCK];
            for (lane, numbers) in lanes.clone().zip(&mut block) {
                let from = from.as_ptr().wrapping_add((self.start)(lane) + columns.start);
                // SAFETY: promised by the caller; the block has 8 of the columns.
                *numbers = unsafe { load(from.cast()) };
            }
            for (column, numbers) in columns.zip(transpose(block)) {
                let to = &mut to[(self.place)(column) * SIDE..][..SIDE][lanes.clone()];
                // SAFETY: 8 numbers of 4 bytes, any of which are valid.
                unsafe { _mm256_storeu_ps(to.as_mut_ptr().cast(), numbers) };
            }
        });
    }

    /// # Safety
    ///
    /// The processor has AVX2, and the rows lie in `to`.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    unsafe fn add_lanes_to_rows_avx2(&self, from: &[f32], to: &mut [f32]) {
        self.blocks(|lanes, columns| {
            if lanes.len() < BLOCK || columns.len() < BLOCK {
                return self.add_back(from, to, lanes, columns);
            }
            let mut block = [_mm256_setzero_ps(); BLOCK];
            for (column, numbers) in columns.clone().zip(&mut block) {
                let from = &from[(self.place)(column) * SIDE..][..SIDE][lanes.clone()];
                // SAFETY: the slice has 8 numbers.
                *numbers = unsafe { load(from.as_ptr()) };
            }
            for (lane, numbers) in lanes.zip(transpose(block)) {
                // SAFETY: promised by the caller; the block has 8 of the columns.
                unsafe {
                    let to = to.as_mut_ptr().add((self.start)(lane) + columns.start);
                    _mm256_storeu_ps(to, _mm256_add_ps(load(to), numbers));
                }
            }
        });
    }
}

/// Transposes 8 × 8 numbers: pairs of rows are interleaved by ones, by twos, and by fours.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2")]
fn transpose(rows: [__m256; BLOCK]) -> [__m256; BLOCK] {
    let [a, b, c, d, e, f, g, h] = rows;
    let ones = |a, b| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let ((ab, ab_high), (cd, cd_high)) = (ones(a, b), ones(c, d));
    let ((ef, ef_high), (gh, gh_high)) = (ones(e, f), ones(g, h));
    let twos = |a, b| (_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b));
    let ((upper_0, upper_1), (upper_2, upper_3)) = (twos(ab, cd), twos(ab_high, cd_high));
    let ((lower_0, lower_1), (lower_2, lower_3)) = (twos(ef, gh), twos(ef_high, gh_high));
    let low = |a, b| _mm256_permute2f128_ps::<0x20>(a, b);
    let high = |a, b| _mm256_permute2f128_ps::<0x31>(a, b);
    [
        low(upper_0, lower_0),
        low(upper_1, lower_1),
        low(upper_2, lower_2),
        low(upper_3, lower_3),
        high(upper_0, lower_0),
        high(upper_1, lower_1),
        high(upper_2, lower_2),
        high(upper_3, lower_3),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every number of every shape arrives at its place, no other is touched, and the way back adds it.
    #[test]
    fn numbers_go_to_their_lanes_and_back() {
        for variant in Variant::available() {
            for (count, len) in
                [(16, 144), (16, 16), (16, 9), (7, 25), (8, 8), (1, 1), (0, 9), (5, 0)]
            {
                let apart = len + 3;
                let from: Vec<f32> = (0..SIDE * apart).map(|at| at as f32).collect();
                // In another order; 7 has no common factor with these lengths, so each column has a place.
                let (start, place) =
                    (|row: usize| row * 5 % SIDE * apart, |column: usize| column * 7 % len.max(1));
                let rows = Interleaving { count, len, start, place };
                let mut to = vec![-1.; len.max(1) * SIDE];
                rows.rows_to_lanes(variant, &from, &mut to);
                for (column, lane) in (0..len).flat_map(|c| (0..SIDE).map(move |lane| (c, lane))) {
                    let expected = if lane < count { from[start(lane) + column] } else { -1. };
                    let found = to[place(column) * SIDE + lane];
                    assert_eq!(found, expected, "{variant}, {count} × {len}");
                }
                let mut back = vec![0.5; from.len()];
                rows.add_lanes_to_rows(variant, &to, &mut back);
                for (at, number) in back.iter().enumerate() {
                    let inside =
                        at % apart < len && (0..count).any(|r| start(r) == at / apart * apart);
                    let expected = if inside { from[at] + 0.5 } else { 0.5 };
                    assert_eq!(*number, expected, "{variant}, {count} × {len}, number {at}");
                }
            }
        }
    }

    fn eight_by_sixteen(numbers: usize, first_place: usize) {
        let rows = Interleaving {
            count: 16,
            len: 8,
            start: |row| row * 8,
            place: |column| first_place + column,
        };
        rows.rows_to_lanes(Variant::fastest(), &vec![0.; numbers], &mut [0.; 8 * SIDE]);
    }

    #[test]
    fn rows_that_fit_exactly_are_taken() {
        eight_by_sixteen(128, 0);
    }

    #[test]
    #[should_panic(expected = "row 15 of 127 numbers")]
    fn rows_past_the_end_are_refused() {
        eight_by_sixteen(127, 0);
    }

    #[test]
    #[should_panic(expected = "out of range")]
    fn places_past_the_end_are_refused() {
        eight_by_sixteen(128, 1);
    }
}
