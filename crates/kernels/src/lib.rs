//! The machine: dispatch, matrix products, convolutions, image rows.

pub mod image;
#[expect(unsafe_code, reason = "the vector instructions of a processor")]
pub mod similarity;
