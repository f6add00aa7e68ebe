//! Which instruction set the kernels use, found when the program runs.

use std::fmt;
use std::sync::OnceLock;

/// A way of writing the same kernels. All give the same results up to rounding; one variant gives
/// the same bits on every machine that has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Variant {
    /// Plain Rust, vectorised by the compiler for the baseline of the target.
    Portable,
    /// AVX2 with fused multiply-add: 8 lanes.
    Avx2,
    /// AVX-512: 16 lanes.
    Avx512,
}

impl Variant {
    /// Every variant there is, slowest first.
    pub const ALL: [Variant; 3] = [Variant::Portable, Variant::Avx2, Variant::Avx512];

    /// The word that names the variant in `ASSORT_KERNEL` and in logs.
    pub fn name(self) -> &'static str {
        match self {
            Variant::Portable => "portable",
            Variant::Avx2 => "avx2",
            Variant::Avx512 => "avx512",
        }
    }

    /// Whether this processor has the instructions.
    pub fn is_available(self) -> bool {
        match self {
            Variant::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Variant::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Variant::Avx512 => {
                Variant::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Variant::Avx2 | Variant::Avx512 => false,
        }
    }

    /// The variant this process uses: the one that `ASSORT_KERNEL` names, or the fastest available.
    ///
    /// # Errors
    ///
    /// `ASSORT_KERNEL` names no variant, or one whose instructions this processor lacks.
    pub fn selected() -> Result<Variant, String> {
        static SELECTED: OnceLock<Result<Variant, String>> = OnceLock::new();
        SELECTED.get_or_init(|| choose(std::env::var("ASSORT_KERNEL").ok().as_deref())).clone()
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn choose(wanted: Option<&str>) -> Result<Variant, String> {
    let available: Vec<Variant> = Variant::ALL.into_iter().filter(|v| v.is_available()).collect();
    let names = || available.iter().map(|v| v.name()).collect::<Vec<_>>().join(", ");
    let Some(wanted) = wanted.filter(|w| !w.is_empty()) else {
        return Ok(available.last().copied().unwrap_or(Variant::Portable));
    };
    match available.iter().find(|v| v.name() == wanted) {
        Some(variant) => Ok(*variant),
        None => Err(format!(
            "ASSORT_KERNEL={wanted} is not usable: this processor has {}; unset it to use the fastest",
            names()
        )),
    }
}

/// Compiles one function body for every variant and calls the one asked for.
///
/// The body becomes an `#[inline(always)]` function, so that the compiler vectorises it anew inside
/// each wrapper with the wrapper's instructions. It must call no closure that runs elsewhere (a
/// parallel loop): those keep the baseline's instructions. Nothing here fuses a multiplication with
/// an addition, so all variants give the same bits.
macro_rules! for_each_variant {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        #[expect(unsafe_code, reason = "calls a function compiled for the instructions found")]
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(variant: $crate::Variant, $($arg: $ty),*) {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body($($arg: $ty),*) $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments)]
            fn avx2($($arg: $ty),*) {
                body($($arg),*)
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]
            #[allow(clippy::too_many_arguments)]
            fn avx512($($arg: $ty),*) {
                body($($arg),*)
            }
            match variant {
                #[cfg(target_arch = "x86_64")]
                $crate::Variant::Avx2 => {
                    assert!(variant.is_available());
                    // SAFETY: the line above found the instructions on this processor.
                    unsafe { avx2($($arg),*) }
                }
                #[cfg(target_arch = "x86_64")]
                $crate::Variant::Avx512 => {
                    assert!(variant.is_available());
                    // SAFETY: the line above found the instructions on this processor.
                    unsafe { avx512($($arg),*) }
                }
                _ => body($($arg),*),
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
        assert_eq!(choose(Some("portable")), Ok(Variant::Portable));
        assert!(choose(None).expect("some variant").is_available());
        assert_eq!(choose(Some("")), choose(None));
        let error = choose(Some("avx1024")).expect_err("no such variant");
        assert!(error.contains("avx1024") && error.contains("portable"), "{error}");
    }
}
