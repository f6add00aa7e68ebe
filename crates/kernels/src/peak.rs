//! The peak rate of the processor, as a yardstick for products.
#![cfg_attr(target_arch = "x86_64", expect(unsafe_code, reason = "a loop of vector instructions"))]

use crate::{Precision, Variant};

/// The floating-point operations per second (two for each multiply-add) of `threads` threads that only
/// multiply numbers in registers, with the instructions of `variant` for products of `precision`: the
/// best of several runs of some milliseconds. All threads run at once, since two of them may share the
/// multipliers of one core. `None` for the portable kernels, whose instructions the compiler chooses, and for
/// emulated ones.
#[cfg_attr(
    not(target_arch = "x86_64"),
    expect(unused_variables, reason = "all variants are portable")
)]
pub fn peak(variant: Variant, precision: Precision, threads: usize) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    return x86::peak(variant, precision, threads);
    #[cfg(not(target_arch = "x86_64"))]
    None
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;
    use std::mem::transmute;
    use std::sync::Barrier;
    use std::thread;
    use std::time::Instant;

    use crate::variant::Instructions;
    use crate::{Precision, Variant};

    /// Iterations of the loops below.
    const TIMES: usize = 2_000_000;

    pub(super) fn peak(variant: Variant, precision: Precision, threads: usize) -> Option<f64> {
        let work: fn(usize) -> f64 = match (variant.instructions(), precision) {
            (Instructions::Amx, Precision::Bf16) => crate::tiles::amx_operations,
            (Instructions::Avx512Bf16, Precision::Bf16) => |times| {
                // SAFETY: a `Variant` exists only where its instructions do.
                unsafe { avx512_bf16(times) }
            },
            (Instructions::Avx512 | Instructions::Avx512Bf16 | Instructions::Amx, _) => |times| {
                // SAFETY: as above.
                unsafe { avx512(times) }
            },
            (Instructions::Avx2, _) => |times| {
                // SAFETY: as above.
                unsafe { avx2(times) }
            },
            _ => return None,
        };
        let runs = (0..10).map(|_| {
            let begin = Barrier::new(threads);
            let one = || {
                begin.wait();
                let start = Instant::now();
                let operations = work(TIMES);
                (start, operations, Instant::now())
            };
            let all: Vec<(Instant, f64, Instant)> = thread::scope(|scope| {
                let all: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
                all.into_iter().map(|one| one.join().expect("no panic in arithmetic")).collect()
            });
            let operations: f64 = all.iter().map(|one| one.1).sum();
            let start = all.iter().map(|one| one.0).min().expect("a thread");
            let end = all.iter().map(|one| one.2).max().expect("a thread");
            operations / (end - start).as_secs_f64()
        });
        Some(runs.fold(0., f64::max))
    }

    /// Enough sums to hide the latency of two multipliers.
    const SUMS: usize = 12;

    /// Multiplies `times` rounds of [`SUMS`] registers and returns the number of operations; so do the
    /// two below.
    #[target_feature(enable = "avx512f")]
    fn avx512(times: usize) -> f64 {
        let factor = _mm512_set1_ps(black_box(0.5));
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..times {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(factor, factor, *sum);
            }
        }
        black_box(sums);
        (times * SUMS * 32) as f64
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn avx512_bf16(times: usize) -> f64 {
        // SAFETY: 512 bits of any content.
        let factor: __m512bh = unsafe { transmute(_mm512_set1_epi16(black_box(0x3f00))) };
        let mut sums = [_mm512_setzero_ps(); SUMS];
        for _ in 0..times {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        (times * SUMS * 64) as f64
    }

    #[target_feature(enable = "avx2,fma")]
    fn avx2(times: usize) -> f64 {
        let factor = _mm256_set1_ps(black_box(0.5));
        let mut sums = [_mm256_setzero_ps(); SUMS];
        for _ in 0..times {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(factor, factor, *sum);
            }
        }
        black_box(sums);
        (times * SUMS * 16) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_with_vectors_has_a_peak() {
        assert_eq!(peak(Variant::PORTABLE, Precision::F32, 1), None);
        for variant in Variant::available().into_iter().skip(1) {
            for precision in [Precision::F32, Precision::Bf16] {
                let [one, two] = [1, 2]
                    .map(|threads| peak(variant, precision, threads).expect("vector instructions"));
                assert!(one > 1e8 && two > 1e8, "{variant} {precision:?}: {one}, {two}");
                // Two threads do twice the work in at least half the time, but for the clock rate.
                assert!(two < 4. * one, "{variant} {precision:?}: {one}, {two}");
            }
        }
    }
}
