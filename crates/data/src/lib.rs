//! The files between the stages, and views.
//!
//! One module writes and reads each file format, and its documentation is the specification:
//! [`images`], [`names`] and [`labels`], which `prepare` writes; [`embeddings`], [`pseudo_labels`]
//! and [`head`], which stages pass to each other; [`metrics`], the scores. Each states the pictures
//! that it is about as a [`DataSet`], so that outputs of different data sets are never combined.
//! [`corrections`] has what a person corrected of the clusters: it outlives a data set.
//!
//! [`views`] turns a picture into the input of a network, augmented or not, by operations that the
//! experiment file lists. [`loader`] has threads make batches of them ahead of the training step.
//! [`thumbnail()`] makes the pixel baseline. [`decoded`] caches the decoded pictures of a large
//! collection on disk. `cargo xtask bench data` times views beside torchvision and lightly;
//! `data/README.md` has the results.
//!
//! This crate knows no network and no method. To add an augmentation, see [`views::Operation`].

pub mod corrections;
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

pub use corrections::Corrections;
pub use data_set::DataSet;
pub use embeddings::{EmbeddingWriter, Embeddings, Space};
pub use images::Images;
pub use labels::Labels;
pub use loader::{Batch, Loader};
pub use metrics::RoundMetrics;
pub use names::Names;
pub use picture::{Picture, Pixels};
pub use pseudo_labels::{Found, PseudoLabels};
pub use thumbnail::thumbnail;
