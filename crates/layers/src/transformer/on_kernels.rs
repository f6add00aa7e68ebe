//! The forward pass on the kernels of the CPU.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};
use kernels::transformer::{
    Attention, Factors, Gelu, LayerNorm, LinearOutput, PackedLinear, Rotation, Spread, TokenRows,
    attention, factor_precision, layer_norm, layer_norm_in_place, linear,
};
use kernels::{Buffer, Precision, Variant};
use rayon::prelude::*;

use crate::transformer::plan::CHANNELS;
use crate::transformer::positions::GridPositions;
use crate::transformer::{
    Activation, FinalNorm, Mlp, TokensAfter, TransformerOutput, TransformerPlan, TransformerWeights,
};

/// Pictures that one thread computes at a time: enough to fill nearly all tiles of their rows.
const GROUP: usize = 8;

/// Rows that pass through a norm and the layers after it at a time, so that intermediate values stay in the
/// second-level cache. A multiple of 16.
const ROWS: usize = 128;

/// A transformer with packed weights.
pub(super) struct OnKernels {
    plan: TransformerPlan,
    variant: Variant,
    precision: Precision,
    patch: PackedLinear,
    /// The tokens before the patches, (prefix, d).
    prefix: Vec<f32>,
    pre: Option<NormNumbers>,
    blocks: Vec<PackedBlock>,
    norm: NormNumbers,
    pool: Option<PackedPool>,
    projection: Option<PackedLinear>,
}

struct NormNumbers {
    weight: Vec<f32>,
    bias: Vec<f32>,
    epsilon: f32,
}

impl NormNumbers {
    fn of(weights: &TransformerWeights, name: &str) -> NormNumbers {
        let part = |part| weights.tensor(&format!("{name}.{part}")).to_vec();
        let epsilon = weights.plan().epsilon as f32;
        NormNumbers { weight: part("weight"), bias: part("bias"), epsilon }
    }

    fn kernel(&self) -> LayerNorm<'_> {
        LayerNorm { weight: &self.weight, bias: &self.bias, epsilon: self.epsilon }
    }
}

struct PackedBlock {
    norm1: NormNumbers,
    /// Queries, keys and values side by side.
    qkv: PackedLinear,
    /// With `λ₁` in its weights.
    out: PackedLinear,
    norm2: NormNumbers,
    mlp: PackedMlp,
}

struct PackedMlp {
    kind: Mlp,
    /// Gate and up where it is gated.
    up: PackedLinear,
    /// With `λ₂` in its weights.
    down: PackedLinear,
}

struct PackedPool {
    /// The query of every picture: one row.
    query: Buffer,
    kv: PackedLinear,
    out: PackedLinear,
    norm: NormNumbers,
    mlp: PackedMlp,
}

/// Packs layers of one transformer.
#[derive(Clone, Copy)]
struct Packer<'a> {
    weights: &'a TransformerWeights,
    variant: Variant,
    precision: Precision,
}

impl Packer<'_> {
    /// Weights and biases of layers with the same inputs, one below the other. A missing bias is 0.
    fn stacked(&self, names: &[String], inputs: usize) -> (Vec<f32>, Vec<f32>) {
        let (mut rows, mut biases) = (vec![], vec![]);
        for name in names {
            let weight = self.weights.tensor(&format!("{name}.weight"));
            rows.extend_from_slice(weight);
            match self.weights.get(&format!("{name}.bias")) {
                Some(bias) => biases.extend_from_slice(bias),
                None => biases.resize(rows.len() / inputs, 0.),
            }
        }
        (rows, biases)
    }

    fn layers(&self, names: &[String], inputs: usize) -> PackedLinear {
        let (rows, biases) = self.stacked(names, inputs);
        PackedLinear::new(self.variant, self.precision, inputs, &rows, Some(&biases))
    }

    fn layer(&self, name: &str, inputs: usize) -> PackedLinear {
        self.layers(&[name.to_owned()], inputs)
    }

    /// A layer with the factor of each of its outputs, in f32, before rounding.
    fn scaled(&self, name: &str, inputs: usize, scale: &str) -> PackedLinear {
        let (mut rows, mut biases) = self.stacked(&[name.to_owned()], inputs);
        if let Some(scale) = self.weights.get(scale) {
            for ((row, bias), scale) in rows.chunks_mut(inputs).zip(&mut biases).zip(scale) {
                row.iter_mut().for_each(|weight| *weight *= scale);
                *bias *= scale;
            }
        }
        PackedLinear::new(self.variant, self.precision, inputs, &rows, Some(&biases))
    }

    /// The patch embedding, for pictures whose channels come last.
    fn patch(&self) -> PackedLinear {
        let plan = self.weights.plan();
        let inputs = CHANNELS * plan.patch_pixels * plan.patch_pixels;
        let rows = channels_last(self.weights.tensor("patch.weight"), plan.patch_pixels);
        PackedLinear::new(
            self.variant,
            self.precision,
            inputs,
            &rows,
            self.weights.get("patch.bias"),
        )
    }

    fn block(&self, block: usize) -> PackedBlock {
        let d = self.weights.plan().width;
        let at = |name: &str| format!("blocks.{block}.{name}");
        PackedBlock {
            norm1: NormNumbers::of(self.weights, &at("norm1")),
            qkv: self.layers(&["q", "k", "v"].map(at), d),
            out: self.scaled(&at("out"), d, &at("scale1")),
            norm2: NormNumbers::of(self.weights, &at("norm2")),
            mlp: self.mlp(&at("")),
        }
    }

    fn mlp(&self, at: &str) -> PackedMlp {
        let TransformerPlan { width, mlp: kind, .. } = *self.weights.plan();
        let name = |name: &str| format!("{at}{name}");
        let up = match kind {
            Mlp::Plain { .. } => self.layer(&name("up"), width),
            Mlp::Gated { .. } => {
                let (rows, biases) = self.stacked(&["gate", "up"].map(name), width);
                PackedLinear::gated(self.variant, self.precision, width, &rows, Some(&biases))
            }
        };
        let down = self.scaled(&name("down"), kind.hidden(), &name("scale2"));
        PackedMlp { kind, up, down }
    }

    fn pool(&self) -> PackedPool {
        let d = self.weights.plan().width;
        let mut probe = Factors::zeros(self.precision, 1, d);
        probe.put(0, 0, self.weights.tensor("pool.query"));
        let mut query = Buffer::zeros_of(self.precision, d);
        let output = LinearOutput::Rows { to: &mut query, first: 0 };
        linear(self.variant, &self.layer("pool.q", d), &probe, 0..1, output);
        PackedPool {
            query,
            kv: self.layers(&["pool.k", "pool.v"].map(str::to_owned), d),
            out: self.layer("pool.out", d),
            norm: NormNumbers::of(self.weights, "pool.norm"),
            mlp: self.mlp("pool."),
        }
    }
}

/// Weights (d, 3, p, p) as (d, p, p, 3).
pub(super) fn channels_last(weights: &[f32], patch: usize) -> Vec<f32> {
    let pixels = patch * patch;
    let of_output = |output: &[f32]| -> Vec<f32> {
        let places = (0..pixels).flat_map(|at| (0..CHANNELS).map(move |c| c * pixels + at));
        places.map(|at| output[at]).collect()
    };
    weights.chunks(CHANNELS * pixels).flat_map(of_output).collect()
}

/// Outputs for some pictures, a row each. Outputs that the network lacks are empty.
#[derive(Default)]
struct FeatureRows {
    class: Vec<f32>,
    patch_mean: Vec<f32>,
    pooled: Vec<f32>,
    projection: Vec<f32>,
}

/// The pictures of a group, (H, W, 3) each, and the positions of their patches.
#[derive(Clone, Copy)]
struct GroupInput<'a> {
    pictures: &'a [f32],
    positions: &'a GridPositions,
}

impl OnKernels {
    pub fn new(weights: &TransformerWeights, variant: Variant, precision: Precision) -> OnKernels {
        let plan = weights.plan().clone();
        let precision = factor_precision(variant, precision);
        let packer = Packer { weights, variant, precision };
        let prefix = ["cls", "registers"].iter().filter_map(|name| weights.get(name));
        let prefix = prefix.flatten().copied().collect();
        let blocks: Vec<PackedBlock> =
            (0..plan.depth).into_par_iter().map(|block| packer.block(block)).collect();
        OnKernels {
            variant,
            precision,
            patch: packer.patch(),
            prefix,
            pre: plan.pre_norm.then(|| NormNumbers::of(weights, "pre")),
            blocks,
            norm: NormNumbers::of(weights, "norm"),
            pool: plan.attention_pooling.then(|| packer.pool()),
            projection: plan.projection.map(|_| packer.layer("projection", plan.width)),
            plan,
        }
    }

    pub fn forward(
        &self,
        pictures: &Tensor,
        positions: &GridPositions,
    ) -> Result<TransformerOutput> {
        let n = pictures.dim(0)?;
        let parts = self.in_groups(pictures, positions, |input| self.features(input))?;
        let matrix = |part: fn(&FeatureRows) -> &Vec<f32>| -> Result<Option<Tensor>> {
            let rows: Vec<f32> = parts.iter().flat_map(part).copied().collect();
            let width = rows.len() / n;
            (width > 0).then(|| Tensor::from_vec(rows, (n, width), &Device::Cpu)).transpose()
        };
        Ok(TransformerOutput {
            class: matrix(|rows| &rows.class)?,
            patch_mean: matrix(|rows| &rows.patch_mean)?.expect("every picture has a patch"),
            pooled: matrix(|rows| &rows.pooled)?,
            projection: matrix(|rows| &rows.projection)?,
        })
    }

    pub fn tokens(
        &self,
        pictures: &Tensor,
        positions: &GridPositions,
        after: TokensAfter,
    ) -> Result<Tensor> {
        let parts = self.in_groups(pictures, positions, |input| self.tokens_of(input, after))?;
        let shape = (pictures.dim(0)?, self.tokens_per_picture(positions), self.plan.width);
        Tensor::from_vec(parts.concat(), shape, &Device::Cpu)
    }

    /// Computes groups of pictures on the threads of the pool and returns them in order. The results do not
    /// depend on the size of the groups.
    fn in_groups<R: Send>(
        &self,
        pictures: &Tensor,
        positions: &GridPositions,
        of_group: impl Fn(GroupInput) -> R + Sync,
    ) -> Result<Vec<R>> {
        let n = pictures.dim(0)?;
        let numbers = pictures.flatten_all()?.to_vec1::<f32>()?;
        let group = n.div_ceil(kernels::threads()).min(GROUP) * (numbers.len() / n);
        let groups = numbers.par_chunks(group).with_max_len(1);
        Ok(groups.map(|pictures| of_group(GroupInput { pictures, positions })).collect())
    }

    fn tokens_per_picture(&self, positions: &GridPositions) -> usize {
        self.plan.prefix() + positions.patches()
    }

    fn features(&self, input: GroupInput) -> FeatureRows {
        let (d, prefix) = (self.plan.width, self.plan.prefix());
        let each = self.tokens_per_picture(input.positions);
        let tokens = self.tokens_of(input, TokensAfter::FinalNorm);
        let mut rows = FeatureRows::default();
        for tokens in tokens.chunks_exact(each * d) {
            if self.plan.class_token {
                rows.class.extend_from_slice(&tokens[..d]);
            }
            rows.patch_mean.extend(mean_row(&tokens[prefix * d..], d));
        }
        if self.plan.final_norm == FinalNorm::ClassToken {
            layer_norm_in_place(self.variant, &mut rows.class, self.norm.kernel());
        }
        if let Some(pool) = &self.pool {
            rows.pooled = self.pooled(pool, &tokens, each);
        }
        if let Some(projection) = &self.projection {
            let n = rows.class.len() / d;
            rows.projection = vec![0.; n * projection.outputs()];
            let output = LinearOutput::Add { to: &mut rows.projection, spread: Spread::NONE };
            linear(self.variant, projection, &self.factors(&rows.class, d), 0..n, output);
        }
        rows
    }

    fn tokens_of(&self, input: GroupInput, after: TokensAfter) -> Vec<f32> {
        let mut tokens = self.embedding(input);
        if after == TokensAfter::Embedding {
            return tokens;
        }
        if let Some(pre) = &self.pre {
            layer_norm_in_place(self.variant, &mut tokens, pre.kernel());
        }
        let blocks = match after {
            TokensAfter::Blocks(blocks) => &self.blocks[..blocks],
            _ => &self.blocks[..],
        };
        self.pass(blocks, &mut tokens, input.positions);
        if after == TokensAfter::FinalNorm && self.plan.final_norm == FinalNorm::AllTokens {
            layer_norm_in_place(self.variant, &mut tokens, self.norm.kernel());
        }
        tokens
    }

    /// The first tokens and the embedded patches, with their positions.
    fn embedding(&self, GroupInput { pictures, positions }: GroupInput) -> Vec<f32> {
        let (p, d) = (self.plan.patch_pixels, self.plan.width);
        let (patches, line) = (positions.patches(), positions.columns * p * CHANNELS);
        let n = pictures.len() / (positions.rows * p * line);
        let each = self.tokens_per_picture(positions);
        let one: Vec<f32> = self.prefix.iter().chain(&positions.added).copied().collect();
        let mut tokens = one.repeat(n);
        let mut factors = Factors::zeros(self.precision, ROWS, self.patch.inputs());
        for rows in chunks(n * patches) {
            for (to, patch) in rows.clone().enumerate() {
                let (row, column) = (patch / positions.columns, patch % positions.columns);
                for y in 0..p {
                    let from = (row * p + y) * line + column * p * CHANNELS;
                    factors.put(to, y * p * CHANNELS, &pictures[from..][..p * CHANNELS]);
                }
            }
            let spread =
                Spread { run: patches, stride: each, first: self.plan.prefix(), skip: rows.start };
            let output = LinearOutput::Add { to: &mut tokens, spread };
            linear(self.variant, &self.patch, &factors, 0..rows.len(), output);
        }
        debug_assert_eq!(tokens.len(), n * each * d);
        tokens
    }

    fn pass(&self, blocks: &[PackedBlock], tokens: &mut [f32], positions: &GridPositions) {
        let (d, each) = (self.plan.width, self.tokens_per_picture(positions));
        let rows = tokens.len() / d;
        let mut qkv = Buffer::zeros_of(self.precision, rows * 3 * d);
        let mut attended = Factors::zeros(self.precision, rows, d);
        let mut normed = Factors::zeros(self.precision, ROWS, d);
        let mut hidden = Factors::zeros(self.precision, ROWS, self.plan.mlp.hidden());
        let variant = self.variant;
        for block in blocks {
            for rows in chunks(rows) {
                let from = &tokens[rows.start * d..rows.end * d];
                layer_norm(variant, from, block.norm1.kernel(), &mut normed);
                let output = LinearOutput::Rows { to: &mut qkv, first: rows.start };
                linear(variant, &block.qkv, &normed, 0..rows.len(), output);
            }
            for first in (0..rows).step_by(each) {
                let part = |part: usize| TokenRows {
                    numbers: &qkv,
                    first: first * 3 * d + part * d,
                    stride: 3 * d,
                    rows: each,
                };
                let call = self.attention([part(0), part(1), part(2)], Some(positions));
                attention(variant, &call, &mut attended, first);
            }
            for rows in chunks(rows) {
                let to = &mut tokens[rows.start * d..rows.end * d];
                let output = LinearOutput::Add { to: &mut *to, spread: Spread::NONE };
                linear(variant, &block.out, &attended, rows, output);
                layer_norm(variant, to, block.norm2.kernel(), &mut normed);
                self.mlp(&block.mlp, &normed, &mut hidden, to);
            }
        }
    }

    fn attention<'a>(
        &self,
        [queries, keys, values]: [TokenRows<'a>; 3],
        positions: Option<&'a GridPositions>,
    ) -> Attention<'a> {
        let rotation = positions.and_then(|positions| positions.rotation.as_ref());
        let prefix = self.plan.prefix();
        let rotation = rotation.map(|[cosines, sines]| Rotation { prefix, cosines, sines });
        let (heads, head_width) = (self.plan.heads, self.plan.head_width());
        Attention { heads, head_width, queries, keys, values, rotation }
    }

    /// Adds the MLP of normalised rows to `to`.
    fn mlp(&self, mlp: &PackedMlp, normed: &Factors, hidden: &mut Factors, to: &mut [f32]) {
        let rows = 0..to.len() / self.plan.width;
        let output = match mlp.kind {
            Mlp::Gated { .. } => LinearOutput::Gated { to: hidden },
            Mlp::Plain { activation, .. } => {
                let gelu = match activation {
                    Activation::GeluErf => Gelu::Erf,
                    Activation::GeluTanh => Gelu::Tanh,
                    Activation::GeluQuick => Gelu::Quick,
                };
                LinearOutput::Gelu { to: hidden, gelu }
            }
        };
        linear(self.variant, &mlp.up, normed, rows.clone(), output);
        let output = LinearOutput::Add { to, spread: Spread::NONE };
        linear(self.variant, &mlp.down, hidden, rows, output);
    }

    /// Attention from the learned query to the tokens of each picture, then `y + M(LN(y))`.
    fn pooled(&self, pool: &PackedPool, tokens: &[f32], each: usize) -> Vec<f32> {
        let (d, variant) = (self.plan.width, self.variant);
        let (rows, n) = (tokens.len() / d, tokens.len() / d / each);
        let mut kv = Buffer::zeros_of(self.precision, rows * 2 * d);
        for rows in chunks(rows) {
            let factors = self.factors(&tokens[rows.start * d..rows.end * d], d);
            let output = LinearOutput::Rows { to: &mut kv, first: rows.start };
            linear(variant, &pool.kv, &factors, 0..rows.len(), output);
        }
        let mut attended = Factors::zeros(self.precision, n, d);
        let query = TokenRows { numbers: &pool.query, first: 0, stride: d, rows: 1 };
        for picture in 0..n {
            let part = |part: usize| TokenRows {
                numbers: &kv,
                first: picture * each * 2 * d + part * d,
                stride: 2 * d,
                rows: each,
            };
            attention(
                variant,
                &self.attention([query, part(0), part(1)], None),
                &mut attended,
                picture,
            );
        }
        let mut pooled = vec![0.; n * d];
        let output = LinearOutput::Add { to: &mut pooled, spread: Spread::NONE };
        linear(variant, &pool.out, &attended, 0..n, output);
        let mut normed = Factors::zeros(self.precision, n, d);
        layer_norm(variant, &pooled, pool.norm.kernel(), &mut normed);
        let mut hidden = Factors::zeros(self.precision, n, pool.mlp.kind.hidden());
        self.mlp(&pool.mlp, &normed, &mut hidden, &mut pooled);
        pooled
    }

    fn factors(&self, rows: &[f32], width: usize) -> Factors {
        let mut factors = Factors::zeros(self.precision, rows.len() / width, width);
        for (at, row) in rows.chunks_exact(width).enumerate() {
            factors.put(at, 0, row);
        }
        factors
    }
}

/// A range of rows in parts that pass through the layers together.
fn chunks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(ROWS).map(move |from| from..(from + ROWS).min(rows))
}

fn mean_row(rows: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0f64; width];
    for row in rows.chunks_exact(width) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    let count = (rows.len() / width) as f64;
    sums.into_iter().map(|sum| (sum / count) as f32).collect()
}
