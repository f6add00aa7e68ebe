//! The machine: dispatch, matrix products, convolutions, image rows.

pub mod image;
