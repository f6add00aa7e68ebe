//! The machine: dispatch, matrix products, convolutions, image rows.
