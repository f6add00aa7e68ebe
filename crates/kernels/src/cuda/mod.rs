//! Kernels of our own on CUDA, where a pass over memory per tensor operation would cost the time.
//!
//! [Batch norm](norm) with the sum and the ReLU that follow it, and [updates](flat) of flat parameter
//! buffers. The sources are CUDA C++ in this crate's folder `cuda`, compiled to PTX by the build script
//! (nvcc; the driver compiles PTX for its card when the program starts to use it). They keep to what
//! is C too, so that the tests run them block by block on any machine.
//!
//! Functions take a stream, start their kernels on it and do not wait; results are new memory of that
//! stream. Compiled and, as C, tested; not yet run on a GPU.

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
