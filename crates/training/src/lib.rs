//! What lies between a loss and better weights: the networks that learn and their seams to candle,
//! optimizers, schedules, the order of the images, and runs that can stop and resume.
//!
//! A training stage holds a [`Learner`]: an [`Online`] network and the [`Target`] that follows it;
//! or networks of its own, made of [`TrainedSegment`]s and [`TrainedVariable`]s. Its loop asks a
//! [`Run`] for the next epoch and the [`sampler`] for the epoch's batches, computes a [`loss`] from
//! [`Seam`]s, passes the gradients back, and steps. Losses of other methods are built from the
//! operations in [`ops`] and candle-nn's softmax and cross-entropy.
//!
//! This crate knows no method.

pub mod agreement;
pub mod check;
pub mod checkpoint;
mod device;
mod effort;
mod learner;
pub mod loss;
mod noise;
pub mod ops;
mod optimizer;
mod pictures;
mod precision;
pub mod run;
pub mod sampler;
pub mod scatter;
mod schedule;
mod segment;
pub mod tables;
mod variable;

pub use checkpoint::{Checkpoint, Trained, load_network, load_state, network_tensors};
pub use device::network_device;
pub use effort::picture_cost;
pub use learner::{Learner, Online, Target};
pub use noise::noise;
pub use optimizer::Optimizer;
pub use pictures::{DividedBatches, Views, outputs, pictures, tensors};
pub use precision::Precision;
pub use run::{Advice, Run, RunPlan};
pub use schedule::{Cosine, LearningRate, TargetDecay};
pub use segment::{Seam, TrainedSegment, backward};
pub use tables::{NetworkTable, RunTable, ScheduleTable, SgdTable};
pub use variable::TrainedVariable;
