//! Fused CUDA kernels, where one tensor operation at a time would spend the time on memory accesses.
//!
//! [Batch norm](norm) with the residual sum and the ReLU that follow it, and [updates](flat) of flat
//! parameters. The sources are CUDA C++ in the folder `cuda` of this crate. The build script compiles them
//! to PTX with nvcc, and the driver compiles PTX for its card at first use. The sources are valid C as well,
//! so that the tests run them block by block on any machine.
//!
//! Functions launch their kernels on a stream and do not wait; results are new memory of that stream.
//! Compiled, and tested as C, but not yet run on a GPU.

mod arguments;
#[cfg(feature = "cuda")]
pub mod flat;
#[cfg(feature = "cuda")]
mod modules;
#[cfg(feature = "cuda")]
pub mod norm;
#[cfg(all(test, target_os = "linux"))]
mod tests;

pub use arguments::Extent;
#[cfg(feature = "cuda")]
pub use modules::{CudaElement, Result};
