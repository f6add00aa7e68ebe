//! What lies between a loss and better weights: the networks that learn and their seams to candle,
//! optimizers, schedules, the order of the images, and a run that can stop and go on.
//!
//! A training stage holds a [`Learner`]: an [`Online`] network, the [`Target`] that follows it, and
//! the optimizer, [`Sgd`]. Its loop asks a [`Run`] for the next epoch, the [`sampler`] for the
//! epoch's batches, computes a [`loss`] between the seams of a [`Pass`], hands the gradients back,
//! and steps. A method with other networks gives the run its own [`Trained`], made of
//! [`AdamSegment`]s or of what it likes. Losses of other methods are built from the operations in [`ops`], which are tested
//! against finite differences and give the same bits for any number of threads.
//!
//! This crate knows no picture files and no method.

mod adam;
pub mod agreement;
pub mod check;
mod device;
mod learner;
pub mod loss;
mod noise;
pub mod ops;
mod pictures;
mod precision;
pub mod run;
pub mod sampler;
pub mod scatter;
mod schedule;
mod sgd;
mod trained;

pub use adam::{Adam, AdamSegment, Seam};
pub use device::network_device;
pub use learner::{Learner, Online, Pass, Source, Target};
pub use noise::noise;
pub use pictures::pictures;
pub use precision::Precision;
pub use run::{Plan, Run};
pub use schedule::{Cosine, LearningRate, TargetDecay};
pub use sgd::{Group, Groups, Sgd};
pub use trained::Trained;
