//! What lies between a loss and better weights: optimizers, schedules and the order of the images.
//!
//! Losses are built from the operations in [`ops`], which are tested against finite differences and
//! give the same bits for any number of threads. The [`sampler`] orders the images of an epoch,
//! [`LearningRate`] and [`TargetDecay`] say how a run's rates change.
//!
//! This crate knows no picture files and no method.

mod adam;
mod device;
pub mod loss;
mod noise;
pub mod ops;
mod precision;
pub mod sampler;
mod schedule;

pub use adam::Adam;
pub use device::device;
pub use noise::noise;
pub use precision::Precision;
pub use schedule::{Cosine, LearningRate, TargetDecay};
