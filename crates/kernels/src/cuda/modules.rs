//! Compiled kernels, loaded once per card.

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaFunction, CudaModule, CudaStream, DeviceRepr, LaunchConfig};
use cudarc::nvrtc::Ptx;

use super::arguments::{Extent, THREADS};

/// The result of driver calls.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A type of the numbers in values.
pub trait CudaElement: DeviceRepr + Copy + sealed::Sealed {}

impl CudaElement for f32 {}
impl CudaElement for half::bf16 {}

pub(super) mod sealed {
    use super::KernelSource;

    pub trait Sealed {
        /// The kernels of norms for values of this type.
        const NORM: KernelSource;
    }

    impl Sealed for f32 {
        const NORM: KernelSource = KernelSource::NormF32;
    }

    impl Sealed for half::bf16 {
        const NORM: KernelSource = KernelSource::NormBf16;
    }
}

// SAFETY: plain numbers in C's layout, as `norm.cu` declares them.
unsafe impl DeviceRepr for Extent {}

/// A compiled source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KernelSource {
    Flat,
    NormF32,
    NormBf16,
}

impl KernelSource {
    fn ptx(self) -> &'static str {
        match self {
            KernelSource::Flat => include_str!(concat!(env!("OUT_DIR"), "/flat.ptx")),
            KernelSource::NormF32 => include_str!(concat!(env!("OUT_DIR"), "/norm-f32.ptx")),
            KernelSource::NormBf16 => include_str!(concat!(env!("OUT_DIR"), "/norm-bf16.ptx")),
        }
    }
}

/// Loaded modules and kernels, by card index. A module keeps the context of its card alive.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(usize, KernelSource), Arc<CudaModule>>,
    kernels: HashMap<(usize, KernelSource, &'static str), CudaFunction>,
}

/// Returns the kernel `name` on the card of the stream, loading it at first use.
pub(super) fn kernel(
    stream: &Arc<CudaStream>,
    source: KernelSource,
    name: &'static str,
) -> Result<CudaFunction> {
    static LOADED: Mutex<Option<Loaded>> = Mutex::new(None);
    let (context, card) = (stream.context(), stream.context().ordinal());
    let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
    let Loaded { modules, kernels } = loaded.get_or_insert_default();
    if let Some(known) = kernels.get(&(card, source, name)) {
        return Ok(known.clone());
    }
    let module = match modules.get(&(card, source)) {
        Some(known) => Arc::clone(known),
        None => {
            let module = context
                .load_module(Ptx::from_src(source.ptx()))
                .map_err(|error| format!("loading the kernels {source:?}: {error}"))?;
            modules.insert((card, source), Arc::clone(&module));
            module
        }
    };
    let kernel = module.load_function(name)?;
    kernels.insert((card, source, name), kernel.clone());
    Ok(kernel)
}

/// A launch with this grid of blocks of `THREADS` threads.
pub(super) fn grid([x, y]: [u32; 2]) -> LaunchConfig {
    LaunchConfig { grid_dim: (x, y, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 }
}

/// Fails unless the count of numbers is as expected; the error names `what`.
pub(super) fn check(what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(format!("{what}: {found} numbers, but {expected} are expected").into())
}
