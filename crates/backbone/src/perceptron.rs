//! The plans of projector and predictor: linear, batch norm, ReLU, linear; or only two linear layers.
//!
//! One block, `perceptron`. Parameters `hidden.weight`, `hidden.bias`, `norm.weight`, `norm.bias`,
//! `output.weight`, `output.bias`; the second plan has no norm.

use candle_core::Result;
use layers::{BatchNorm, Builder, Network};

/// The plan from `(N, input)` through `hidden` to `(N, output)`, without batch norm at the end. A width of 0
/// is an error.
pub fn plan(input: usize, hidden: usize, output: usize) -> Result<Network> {
    if [input, hidden, output].contains(&0) {
        candle_core::bail!(
            "perceptron: the widths are {input}, {hidden} and {output}; all must be at least 1"
        )
    }
    let mut builder = Builder::features(input);
    builder.block("perceptron");
    let value = builder.input();
    let value = builder.linear("hidden", value, hidden)?;
    let norm = BatchNorm { epsilon: 1e-5, momentum: 0.1, relu: true, residual: None };
    let value = builder.batch_norm("norm", value, norm)?;
    let value = builder.linear("output", value, output)?;
    builder.finish(value)
}

/// The plan from `(N, input)` through `hidden` to `(N, output)` with nothing between the layers, as in the
/// published program of IMC-SwAV. A width of 0 is an error.
pub fn linear(input: usize, hidden: usize, output: usize) -> Result<Network> {
    let mut builder = Builder::features(input);
    builder.block("perceptron");
    let value = builder.input();
    let value = builder.linear("hidden", value, hidden)?;
    let value = builder.linear("output", value, output)?;
    builder.finish(value)
}
