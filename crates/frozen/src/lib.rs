//! What the stages on frozen embeddings share. They see no picture and train no backbone: rows of
//! `embeddings.safetensors` in, `pseudo-labels.safetensors` and `head.safetensors` out.
//!
//! - [`rows`]: the embeddings of a job, standardised, and k-means on them, which is always run.
//! - [`result`]: which assignments to trust, and the file of the result.
//! - [`product`]: matrix products in f32, and in f64 for tests.
//!
//! This crate knows no method.

pub mod product;
pub mod result;
pub mod rows;
