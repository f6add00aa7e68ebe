//! A transformer with its numbers, on a device.

use candle_core::{DType, Device, Result, Tensor, bail};
use kernels::{Precision, Variant};

use crate::transformer::plan::CHANNELS;
use crate::transformer::positions::GridPositions;
use crate::transformer::{OnKernels, OnTensors, TransformerPlan, TransformerWeights};

/// A Vision Transformer with its numbers, for inference: on the CPU with the kernels of the crate `kernels`,
/// on other devices with candle's operations.
///
/// Products read bf16 or f32; sums, norms, softmax and the stream of tokens are f32. On a CPU without
/// instructions for products of bf16, both precisions compute in f32. The numbers of a picture do not depend on
/// the other pictures of a call, on the CPU to the bit.
pub struct Transformer {
    plan: TransformerPlan,
    device: Device,
    positions: Option<Vec<f32>>,
    computation: Computation,
}

enum Computation {
    Kernels(Box<OnKernels>),
    Tensors(OnTensors),
}

/// What a transformer computes from pictures: f32, a row for each picture.
#[derive(Clone, Debug)]
pub struct TransformerOutput {
    /// The class token after the final norm, (N, d).
    pub class: Option<Tensor>,
    /// The mean over the patches' tokens, after the final norm where it covers them, (N, d).
    pub patch_mean: Tensor,
    /// The tokens pooled by attention, (N, d).
    pub pooled: Option<Tensor>,
    /// The projection of the class token, (N, P), not normalised.
    pub projection: Option<Tensor>,
}

impl TransformerOutput {
    /// The one output that stands for the picture: the projection, else the pooled tokens, else the class
    /// token, else the mean of the patches. Its width is
    /// [`TransformerPlan::feature_width`].
    pub fn feature(&self) -> &Tensor {
        let Self { class, patch_mean, pooled, projection } = self;
        projection.as_ref().or(pooled.as_ref()).or(class.as_ref()).unwrap_or(patch_mean)
    }
}

/// A place in a transformer where its tokens can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokensAfter {
    /// After patch embedding and positions, before the norm that may precede the blocks.
    Embedding,
    /// After so many blocks, before the final norm.
    Blocks(usize),
    /// At the end: after the final norm where it covers all tokens.
    FinalNorm,
}

impl Transformer {
    /// Arranges the numbers for a device.
    ///
    /// # Errors
    ///
    /// `ASSORT_KERNEL` names a variant that this processor cannot run; the device fails.
    pub fn new(
        weights: &TransformerWeights,
        device: &Device,
        precision: Precision,
    ) -> Result<Self> {
        if !device.is_cpu() {
            return Transformer::on_tensors(weights, device, precision);
        }
        match Variant::selected() {
            Ok(variant) => Ok(Transformer::on_variant(weights, variant, precision)),
            Err(message) => bail!("{message}"),
        }
    }

    /// On the CPU, with the kernels of this variant.
    pub fn on_variant(
        weights: &TransformerWeights,
        variant: Variant,
        precision: Precision,
    ) -> Self {
        let computation =
            Computation::Kernels(Box::new(OnKernels::new(weights, variant, precision)));
        Transformer::of(weights, &Device::Cpu, computation)
    }

    /// With candle's operations, on any device.
    ///
    /// # Errors
    ///
    /// The device fails.
    pub fn on_tensors(
        weights: &TransformerWeights,
        device: &Device,
        precision: Precision,
    ) -> Result<Self> {
        let computation = Computation::Tensors(OnTensors::new(weights, device, precision)?);
        Ok(Transformer::of(weights, device, computation))
    }

    fn of(weights: &TransformerWeights, device: &Device, computation: Computation) -> Self {
        let positions = weights.get("positions").map(<[f32]>::to_vec);
        Transformer { plan: weights.plan().clone(), device: device.clone(), positions, computation }
    }

    /// The plan.
    pub fn plan(&self) -> &TransformerPlan {
        &self.plan
    }

    /// The outputs for pictures (N, H, W, 3), f32, on this device, normalised as the network was trained.
    ///
    /// # Errors
    ///
    /// There is no picture, the pictures have another type, shape or device, or a side is not a multiple of
    /// the patch.
    pub fn forward(&self, pictures: &Tensor) -> Result<TransformerOutput> {
        let positions = self.positions_for(pictures)?;
        match &self.computation {
            Computation::Kernels(network) => network.forward(pictures, &positions),
            Computation::Tensors(network) => network.forward(pictures, &positions),
        }
    }

    /// The tokens (N, class + registers + patches, d) somewhere in the network, f32.
    ///
    /// # Errors
    ///
    /// As [`forward`](Self::forward); the network has fewer blocks.
    pub fn tokens(&self, pictures: &Tensor, after: TokensAfter) -> Result<Tensor> {
        let positions = self.positions_for(pictures)?;
        if let TokensAfter::Blocks(blocks) = after
            && blocks > self.plan.depth
        {
            bail!("tokens after {blocks} blocks of a transformer that has {}", self.plan.depth)
        }
        match &self.computation {
            Computation::Kernels(network) => network.tokens(pictures, &positions, after),
            Computation::Tensors(network) => network.tokens(pictures, &positions, after),
        }
    }

    fn positions_for(&self, pictures: &Tensor) -> Result<GridPositions> {
        let (n, height, width) = match *pictures.dims() {
            [n, height, width, CHANNELS] => (n, height, width),
            _ => bail!(
                "a transformer takes pictures (N, H, W, 3), but they are {:?}",
                pictures.dims()
            ),
        };
        if pictures.dtype() != DType::F32 || !pictures.device().same_device(&self.device) {
            bail!(
                "the transformer is on {:?} and takes f32, but the pictures are {:?} on {:?}",
                self.device.location(),
                pictures.dtype(),
                pictures.device().location()
            )
        }
        if n == 0 {
            bail!("a transformer needs at least one picture")
        }
        let (rows, columns) = self.plan.patch_grid(height, width)?;
        Ok(GridPositions::new(&self.plan, self.positions.as_deref(), [rows, columns]))
    }
}
