//! The instruction set of the kernels, detected at run time.

use std::fmt;
use std::sync::OnceLock;

/// An implementation of the kernels that this processor can run. Results of variants agree up to
/// rounding; one variant gives the same bits on every machine that has it.
///
/// Only this module creates one, after it has detected the instructions. So a `Variant` proves that
/// functions compiled for these instructions may be called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant(Instructions);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Instructions {
    /// Plain Rust, vectorised by the compiler for the baseline of the target.
    Portable,
    /// AVX2 with fused multiply-add: 8 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512: 16 lanes.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with products of bfloat16 pairs; like `Avx512` for f32.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// AVX-512 and AMX, a unit that multiplies bfloat16 tiles.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX2, with AMX emulated in software, to test the code around the unit.
    #[cfg(target_arch = "x86_64")]
    AmxEmulated,
}

impl Variant {
    /// Plain Rust, vectorised by the compiler for the baseline of the target.
    pub const PORTABLE: Variant = Variant(Instructions::Portable);

    /// The variants that this processor can run, slowest first.
    pub fn available() -> Vec<Variant> {
        #[cfg_attr(not(target_arch = "x86_64"), expect(unused_mut, reason = "no others yet"))]
        let mut all = vec![Variant::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2 {
                all.push(Variant(Instructions::Avx2));
            }
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                all.push(Variant(Instructions::Avx512));
                if is_x86_feature_detected!("avx512bf16") {
                    all.push(Variant(Instructions::Avx512Bf16));
                    // Every processor with tiles rounds to bfloat16 as well.
                    if crate::tiles::amx_is_usable() {
                        all.push(Variant(Instructions::Amx));
                    }
                }
            }
        }
        all
    }

    /// The variants to test: the [`available`](Self::available) ones, and `amx-emulated` on any processor
    /// with AVX2. The emulation is slow.
    pub fn testable() -> Vec<Variant> {
        let all = Variant::available();
        #[cfg(target_arch = "x86_64")]
        if all.contains(&Variant(Instructions::Avx2)) {
            return [all, vec![Variant(Instructions::AmxEmulated)]].concat();
        }
        all
    }

    /// The name of the variant in `ASSORT_KERNEL` and in logs.
    pub fn name(self) -> &'static str {
        match self.0 {
            Instructions::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Instructions::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Instructions::AmxEmulated => "amx-emulated",
        }
    }

    /// The fastest variant of this processor, regardless of `ASSORT_KERNEL`: for kernels whose variants
    /// all give the same bits.
    pub fn fastest() -> Variant {
        static FASTEST: OnceLock<Variant> = OnceLock::new();
        *FASTEST.get_or_init(|| Variant::available().pop().unwrap_or(Variant::PORTABLE))
    }

    /// The variant of this process: the one that `ASSORT_KERNEL` names, or the fastest.
    ///
    /// # Errors
    ///
    /// `ASSORT_KERNEL` names an unknown variant, or one that this processor cannot run.
    pub fn selected() -> Result<Variant, String> {
        static SELECTED: OnceLock<Result<Variant, String>> = OnceLock::new();
        SELECTED.get_or_init(|| choose(std::env::var("ASSORT_KERNEL").ok().as_deref())).clone()
    }

    /// Whether a tile unit, real or emulated, computes products of bfloat16.
    pub(crate) fn has_tile_unit(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return matches!(self.0, Instructions::Amx | Instructions::AmxEmulated);
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    pub(crate) fn instructions(self) -> Instructions {
        self.0
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn choose(wanted: Option<&str>) -> Result<Variant, String> {
    let available = Variant::available();
    let Some(wanted) = wanted.filter(|wanted| !wanted.is_empty()) else {
        return Ok(available.last().copied().unwrap_or(Variant::PORTABLE));
    };
    Variant::testable().iter().find(|variant| variant.name() == wanted).copied().ok_or_else(|| {
        let names: Vec<&str> = available.iter().map(|variant| variant.name()).collect();
        format!(
            "this processor cannot run ASSORT_KERNEL={wanted}; choose one of {}, or unset it to use the \
             fastest",
            names.join(", ")
        )
    })
}

/// Compiles a function body for every variant, and calls the one of the given variant.
///
/// The body becomes an `#[inline(always)]` function, which the compiler vectorises inside each wrapper
/// with the wrapper's instructions. It must not start a parallel loop, whose closures would be compiled
/// for the baseline. No multiplication is fused with an addition, so all variants give the same bits.
macro_rules! for_each_variant {
    ($(#[$meta:meta])* $vis:vis fn $name:ident $(<$($t:ident: $bound:path),+ $(; $(const $size:ident),+)?>)? ($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        #[cfg_attr(
            target_arch = "x86_64",
            expect(unsafe_code, reason = "calls a function compiled for the detected instructions")
        )]
        #[allow(clippy::too_many_arguments)]
        $vis fn $name $(<$($t: $bound,)+ $($(const $size: usize,)+)?>)? (variant: $crate::Variant, $($arg: $ty),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<$($t: $bound,)+ $($(const $size: usize,)+)?>)? ($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2 $(<$($t: $bound,)+ $($(const $size: usize,)+)?>)? ($($arg: $ty),*) {
                body $(::<$($t,)+ $($($size,)+)?>)? ($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
            #[allow(clippy::too_many_arguments)]
            fn avx512 $(<$($t: $bound,)+ $($(const $size: usize,)+)?>)? ($($arg: $ty),*) {
                body $(::<$($t,)+ $($($size,)+)?>)? ($($arg),*)
            }
            match variant.instructions() {
                #[cfg(target_arch = "x86_64")]
                $crate::variant::Instructions::Avx2
                | $crate::variant::Instructions::AmxEmulated => {
                    // SAFETY: a `Variant` exists only if the processor has its instructions.
                    unsafe { avx2 $(::<$($t,)+ $($($size,)+)?>)? ($($arg),*) }
                }
                #[cfg(target_arch = "x86_64")]
                $crate::variant::Instructions::Avx512
                | $crate::variant::Instructions::Avx512Bf16
                | $crate::variant::Instructions::Amx => {
                    // SAFETY: as above.
                    unsafe { avx512 $(::<$($t,)+ $($($size,)+)?>)? ($($arg),*) }
                }
                $crate::variant::Instructions::Portable => body $(::<$($t,)+ $($($size,)+)?>)? ($($arg),*),
            }
        }
    };
}
pub(crate) use for_each_variant;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_names_a_variant_or_is_an_error() {
        assert_eq!(choose(Some("portable")), Ok(Variant::PORTABLE));
        assert!(Variant::available().contains(&choose(None).expect("some variant")));
        assert_eq!(choose(Some("")), choose(None));
        let error = choose(Some("avx1024")).expect_err("no such variant");
        assert!(error.contains("avx1024") && error.contains("portable"), "{error}");
    }
}
