//! Kernels by name, loaded once for each card.

use std::collections::HashMap;
use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaFunction, CudaModule, CudaStream, DeviceRepr, LaunchConfig};
use cudarc::nvrtc::Ptx;

use super::arguments::{Extent, THREADS};

/// A failure of the driver.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// A type of numbers that values are stored in.
pub trait CudaElement: DeviceRepr + Copy + sealed::Sealed {}

impl CudaElement for f32 {}
impl CudaElement for half::bf16 {}

pub(super) mod sealed {
    use super::Source;

    pub trait Sealed {
        /// The kernels of norms for values of this type.
        const NORM: Source;
    }

    impl Sealed for f32 {
        const NORM: Source = Source::NormF32;
    }

    impl Sealed for half::bf16 {
        const NORM: Source = Source::NormBf16;
    }
}

// SAFETY: plain numbers in C's order, as `norm.cu` declares them.
unsafe impl DeviceRepr for Extent {}

/// A source of kernels, compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    Flat,
    NormF32,
    NormBf16,
}

impl Source {
    fn ptx(self) -> &'static str {
        match self {
            Source::Flat => include_str!(concat!(env!("OUT_DIR"), "/flat.ptx")),
            Source::NormF32 => include_str!(concat!(env!("OUT_DIR"), "/norm-f32.ptx")),
            Source::NormBf16 => include_str!(concat!(env!("OUT_DIR"), "/norm-bf16.ptx")),
        }
    }
}

/// What was loaded, by the number of the card. A module keeps its card's context alive.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(usize, Source), Arc<CudaModule>>,
    kernels: HashMap<(usize, Source, &'static str), CudaFunction>,
}

/// The kernel `name` on the stream's card.
pub(super) fn kernel(
    stream: &Arc<CudaStream>,
    source: Source,
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

/// One thread for each of `THREADS` places in each of the blocks.
pub(super) fn grid([x, y]: [u32; 2]) -> LaunchConfig {
    LaunchConfig { grid_dim: (x, y, 1), block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 }
}

/// An error that names `what` unless it holds as many numbers as expected.
pub(super) fn check(what: &str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(format!("{what}: {found} numbers, expected {expected}").into())
}
