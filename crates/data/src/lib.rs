//! The files between the stages, and views.
//!
//! One module writes and reads each file format, and its documentation is the specification:
//! [`images`], [`names`] and [`labels`], which `prepare` writes; [`embeddings`], [`pseudo_labels`]
//! and [`head`], which stages hand to each other. All of them say which pictures they are
//! about by a [`DataSet`], so that nothing is combined with the outputs of
//! another data set.
//!
//! [`views`] turns a picture into a network's input, augmented or not, by operations that the
//! experiment file lists; [`loader`] has threads make batches of them ahead of the training step;
//! [`thumbnail()`] makes the pixel baseline. [`decoded`] keeps large collections decoded on disk.
//!
//! `cargo xtask bench data` times two views of each picture beside torchvision and lightly. On two
//! cores with AVX-512 they are made 78 times as fast as by the faster of these from arrays of 32 × 32
//! pixels, 3.8 and 6.5 times from JPEG files of 500 × 375 to 96 and 224 pixels, and 17 and 11 times
//! where the peers decode and we have the copy.
//!
//! This crate knows no network and no method. To add an augmentation, see [`views::Operation`].

pub mod data_set;
pub mod decoded;
pub mod embeddings;
pub mod head;
pub mod images;
pub mod labels;
pub mod loader;
pub mod metrics;
pub mod names;
pub mod picture;
pub mod pseudo_labels;
pub mod thumbnail;
pub mod views;

pub use data_set::DataSet;
pub use embeddings::{EmbeddingRows, Embeddings, Space};
pub use images::Images;
pub use labels::Labels;
pub use loader::{Batch, Loader};
pub use metrics::RoundMetrics;
pub use names::Names;
pub use picture::{Picture, Pixels};
pub use pseudo_labels::{Found, PseudoLabels};
pub use thumbnail::thumbnail;
