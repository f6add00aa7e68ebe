//! The forward pass with candle's operations, on any of its devices.

use std::collections::BTreeMap;

use candle_core::{D, DType, Device, Result, Tensor};
use kernels::Precision;

use crate::transformer::on_kernels::channels_last;
use crate::transformer::plan::CHANNELS;
use crate::transformer::positions::GridPositions;
use crate::transformer::{
    Activation, FinalNorm, Mlp, TokensAfter, TransformerOutput, TransformerPlan, TransformerTensor,
    TransformerWeights,
};

/// A transformer whose numbers are candle tensors.
pub(super) struct OnTensors {
    plan: TransformerPlan,
    device: Device,
    /// The type of the factors of products.
    dtype: DType,
    /// By name: matrices transposed, (inputs, outputs), in `dtype`; everything else in f32.
    tensors: BTreeMap<String, Tensor>,
}

impl OnTensors {
    pub fn new(
        weights: &TransformerWeights,
        device: &Device,
        precision: Precision,
    ) -> Result<OnTensors> {
        let plan = weights.plan().clone();
        let dtype = match precision {
            Precision::F32 => DType::F32,
            Precision::Bf16 => DType::BF16,
        };
        let mut tensors = BTreeMap::new();
        for TransformerTensor { name, shape } in plan.tensors() {
            let numbers = match name.as_str() {
                "patch.weight" => channels_last(weights.tensor(&name), plan.patch_pixels),
                _ => weights.tensor(&name).to_vec(),
            };
            let tensor = if shape.len() > 1 && name.ends_with(".weight") {
                let matrix = Tensor::from_vec(numbers, (shape[0], ()), device)?;
                matrix.t()?.contiguous()?.to_dtype(dtype)?
            } else {
                Tensor::from_vec(numbers, shape, device)?
            };
            tensors.insert(name, tensor);
        }
        Ok(OnTensors { plan, device: device.clone(), dtype, tensors })
    }

    pub fn forward(
        &self,
        pictures: &Tensor,
        positions: &GridPositions,
    ) -> Result<TransformerOutput> {
        let tokens = self.tokens(pictures, positions, TokensAfter::FinalNorm)?;
        let prefix = self.plan.prefix();
        let mut class = None;
        if self.plan.class_token {
            let token = tokens.narrow(1, 0, 1)?.squeeze(1)?.contiguous()?;
            class = Some(match self.plan.final_norm {
                FinalNorm::AllTokens => token,
                FinalNorm::ClassToken => self.norm("norm", &token)?,
            });
        }
        let projection = match (&class, self.plan.projection) {
            (Some(class), Some(_)) => Some(self.linear("projection", class)?),
            _ => None,
        };
        let pooled = if self.plan.attention_pooling { Some(self.pooled(&tokens)?) } else { None };
        let patch_mean = tokens.narrow(1, prefix, positions.patches())?.contiguous()?.mean(1)?;
        Ok(TransformerOutput { class, patch_mean, pooled, projection })
    }

    pub fn tokens(
        &self,
        pictures: &Tensor,
        positions: &GridPositions,
        after: TokensAfter,
    ) -> Result<Tensor> {
        let mut tokens = self.embedding(pictures, positions)?;
        let blocks = match after {
            TokensAfter::Embedding => return Ok(tokens),
            TokensAfter::Blocks(blocks) => blocks,
            TokensAfter::FinalNorm => self.plan.depth,
        };
        if self.plan.pre_norm {
            tokens = self.norm("pre", &tokens)?;
        }
        let rotation = self.rotation(positions)?;
        for block in 0..blocks {
            tokens = self.block(&format!("blocks.{block}."), &tokens, rotation.as_ref())?;
        }
        if after == TokensAfter::FinalNorm && self.plan.final_norm == FinalNorm::AllTokens {
            tokens = self.norm("norm", &tokens)?;
        }
        Ok(tokens)
    }

    fn embedding(&self, pictures: &Tensor, positions: &GridPositions) -> Result<Tensor> {
        let (n, p, d) = (pictures.dim(0)?, self.plan.patch_pixels, self.plan.width);
        let (rows, columns, patches) = (positions.rows, positions.columns, positions.patches());
        let pixels = pictures.contiguous()?.reshape((n * rows, p, columns, p * CHANNELS))?;
        let pixels = pixels.transpose(1, 2)?.contiguous()?;
        let embedded = self.linear("patch", &pixels.reshape((n, patches, p * p * CHANNELS))?)?;
        let added = Tensor::from_slice(&positions.added, (1, patches, d), &self.device)?;
        let mut parts = vec![];
        for name in ["cls", "registers"] {
            if let Some(tensor) = self.tensors.get(name) {
                let tensor = tensor.reshape((1, (), d))?;
                let rows = tensor.dim(1)?;
                parts.push(tensor.broadcast_as((n, rows, d))?.contiguous()?);
            }
        }
        parts.push(embedded.broadcast_add(&added)?);
        Tensor::cat(&parts, 1)
    }

    /// Cosines and sines for every token, (tokens, e): 1 and 0 before the patches.
    fn rotation(&self, positions: &GridPositions) -> Result<Option<[Tensor; 2]>> {
        let Some(tables) = &positions.rotation else { return Ok(None) };
        let (prefix, half) = (self.plan.prefix(), self.plan.head_width() / 2);
        let table = |table: &[f32], before: f64| {
            let table = Tensor::from_slice(table, (positions.patches(), half), &self.device)?;
            let before =
                Tensor::zeros((prefix, half), DType::F32, &self.device)?.affine(0., before)?;
            let all = Tensor::cat(&[before, table], 0)?;
            Tensor::cat(&[&all, &all], 1)
        };
        Ok(Some([table(&tables[0], 1.)?, table(&tables[1], 0.)?]))
    }

    fn block(&self, at: &str, tokens: &Tensor, rotation: Option<&[Tensor; 2]>) -> Result<Tensor> {
        let y = self.norm(&format!("{at}norm1"), tokens)?;
        let [q, k, v] = ["q", "k", "v"].map(|name| self.linear(&format!("{at}{name}"), &y));
        let y = self.attention(q?, k?, v?, rotation)?;
        let y = self.linear(&format!("{at}out"), &y)?;
        let tokens = (tokens + self.scaled(&format!("{at}scale1"), y)?)?;
        let y = self.norm(&format!("{at}norm2"), &tokens)?;
        let y = self.mlp(at, &y)?;
        tokens + self.scaled(&format!("{at}scale2"), y)?
    }

    fn scaled(&self, scale: &str, x: Tensor) -> Result<Tensor> {
        match self.tensors.get(scale) {
            Some(scale) => x.broadcast_mul(scale),
            None => Ok(x),
        }
    }

    /// `softmax(Q Kᵀ / √e) V` of (N, tokens, d), with the softmax in f32.
    fn attention(
        &self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: Option<&[Tensor; 2]>,
    ) -> Result<Tensor> {
        let (heads, e) = (self.plan.heads, self.plan.head_width());
        let split = |x: Tensor| {
            let (n, rows, _) = x.dims3()?;
            x.reshape((n, rows, heads, e))?.transpose(1, 2)?.contiguous()
        };
        let rotated = |x: Tensor| -> Result<Tensor> {
            let x = split(x)?;
            let Some([cosines, sines]) = rotation else { return Ok(x) };
            let (first, second) =
                (x.narrow(D::Minus1, 0, e / 2)?, x.narrow(D::Minus1, e / 2, e / 2)?);
            let turned = Tensor::cat(&[second.neg()?, first], D::Minus1)?;
            x.broadcast_mul(cosines)? + turned.broadcast_mul(sines)?
        };
        let (n, rows, d) = q.dims3()?;
        let (q, k) = (rotated(q)?.to_dtype(self.dtype)?, rotated(k)?.to_dtype(self.dtype)?);
        let scores = q.matmul(&k.t()?.contiguous()?)?.to_dtype(DType::F32)?;
        let scores = (scores / (e as f64).sqrt())?;
        let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
        let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
        let output = weights.to_dtype(self.dtype)?.matmul(&split(v)?.to_dtype(self.dtype)?)?;
        output.to_dtype(DType::F32)?.transpose(1, 2)?.contiguous()?.reshape((n, rows, d))
    }

    fn mlp(&self, at: &str, x: &Tensor) -> Result<Tensor> {
        let up = self.linear(&format!("{at}up"), x)?;
        let hidden = match self.plan.mlp {
            Mlp::Gated { .. } => (self.linear(&format!("{at}gate"), x)?.silu()? * up)?,
            Mlp::Plain { activation: Activation::GeluErf, .. } => up.gelu_erf()?,
            // candle's `gelu` is the form with tanh.
            Mlp::Plain { activation: Activation::GeluTanh, .. } => up.gelu()?,
            // x σ(1.702 x) = silu(1.702 x) / 1.702.
            Mlp::Plain { activation: Activation::GeluQuick, .. } => {
                ((up * 1.702)?.silu()? / 1.702)?
            }
        };
        self.linear(&format!("{at}down"), &hidden)
    }

    /// Attention from the learned query to the tokens of each picture, then `y + M(LN(y))`.
    fn pooled(&self, tokens: &Tensor) -> Result<Tensor> {
        let (n, _, d) = tokens.dims3()?;
        let query = self.tensors["pool.query"].reshape((1, 1, d))?.broadcast_as((n, 1, d))?;
        let q = self.linear("pool.q", &query.contiguous()?)?;
        let [k, v] = ["pool.k", "pool.v"].map(|name| self.linear(name, tokens));
        let y = self.linear("pool.out", &self.attention(q, k?, v?, None)?)?;
        let y = (&y + self.mlp("pool.", &self.norm("pool.norm", &y)?)?)?;
        y.squeeze(1)
    }

    /// Products in the factors' type; the bias is added in f32.
    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let weight = &self.tensors[&format!("{name}.weight")];
        let (inputs, outputs) = weight.dims2()?;
        let mut shape = x.dims().to_vec();
        *shape.last_mut().expect("rows") = outputs;
        let product = x.reshape(((), inputs))?.to_dtype(self.dtype)?.matmul(weight)?;
        let product = product.to_dtype(DType::F32)?.reshape(shape)?;
        match self.tensors.get(&format!("{name}.bias")) {
            Some(bias) => product.broadcast_add(bias),
            None => Ok(product),
        }
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let normed = centred.broadcast_div(&(variance + self.plan.epsilon)?.sqrt()?)?;
        let [weight, bias] =
            ["weight", "bias"].map(|part| &self.tensors[&format!("{name}.{part}")]);
        normed.broadcast_mul(weight)?.broadcast_add(bias)
    }
}
