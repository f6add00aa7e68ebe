//! Kernels: the loops that decide the speed of networks, augmentation and clustering.
//!
//! Tile products, convolutions, batch norm, pooling, updates of flat parameters, [transformers](transformer),
//! [image rows](image), [row products](similarity) and the [repulsion] of points on a map. Each is plain Rust compiled for several instruction sets, or written with
//! the intrinsics of one; the [`Variant`] is chosen when the program runs. `README.md` beside this crate
//! says which there are and how fast they are.
//!
//! Values inside a network have a memory layout of this crate ([`Shape`]). Other crates hold them in a
//! [`Buffer`] and never index into it:
//!
//! ```
//! use kernels::convolution::{self, PackedFor, Finish, Geometry, PackedWeights};
//! use kernels::{Buffer, BufferPool, Precision, Shape, Variant};
//!
//! // One image of 1 × 2 pixels and a linear map from 2 channels to 1: a convolution with kernel 1.
//! let g = Geometry::new(Shape::new(1, 1, 2, 2), 1, 1, 1, 0).expect("an output pixel");
//! let (variant, pool) = (Variant::fastest(), BufferPool::new());
//! let (mut input, mut output) = (Buffer::zeros(g.input.len()), Buffer::zeros(g.output.len()));
//! g.input.pack(&[1., 2., 3., 4.], &mut input); // In the order (N, H, W, C).
//!
//! let packing = g.packing(variant, Precision::F32, PackedFor::Forward);
//! let packed = PackedWeights::new(packing, &[10., 1.], &pool);
//! convolution::forward(variant, &g, &input, &packed, Finish::default(), &mut output, None);
//!
//! let mut rows = [0.; 2];
//! g.output.unpack(&output, &mut rows);
//! assert_eq!(rows, [12., 34.]);
//! ```
//!
//! **Bit-identical for any number of threads.** Every sum over images or pixels is split into parts by the
//! shape of the data alone. Each part is summed by one thread in a fixed order, and the parts are added in
//! a fixed order. The number of threads decides who computes a part, never what a part is.
//!
//! Nearly all `unsafe` code of the workspace is in this crate. It knows no network, no parameter names and
//! no training: `layers` combines its functions.

mod buffer;
pub mod convolution;
#[cfg(any(test, feature = "cuda"))]
#[expect(unsafe_code, reason = "kernels on a GPU, and as C in tests")]
pub mod cuda;
#[cfg(feature = "cudnn")]
#[expect(unsafe_code, reason = "memory of a GPU, and calls to cuDNN")]
pub mod cudnn;
mod element;
pub mod flat;
pub mod image;
mod layout;
pub mod linear;
#[expect(unsafe_code, reason = "gemm takes pointers")]
pub mod matrix;
pub mod norm;
mod packed_product;
mod pages;
mod parallel;
mod peak;
pub mod pooling;
pub mod repulsion;
#[expect(unsafe_code, reason = "the vector instructions of a processor")]
pub mod similarity;
mod tiles;
pub mod transformer;
mod transpose;
mod variant;

pub use buffer::{Buffer, BufferPool};
pub use element::Precision;
pub use layout::Shape;
pub use pages::zeros;
pub use parallel::{on_workers, threads};
pub use peak::peak;
pub use variant::Variant;
