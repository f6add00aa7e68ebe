//! Tapes: forward passes recorded for their backward passes.

use std::sync::Arc;

use kernels::Shape;

#[cfg(feature = "cuda")]
use crate::backend::Cuda;
use crate::backend::{Cpu, Grouped, Operations, Tensors};
use crate::plan::NetworkPlan;

/// A recorded forward pass, for one input shape, until its backward pass consumes it.
///
/// A step holds as many as it needs: two views, crops of two sizes, a last small batch. The memory
/// comes from the network's pool and goes back there when the tape is consumed, cleared or dropped.
#[derive(Default)]
pub struct Tape {
    pub(crate) record: Option<TapeRecord>,
}

/// A recorded forward pass.
pub(crate) struct TapeRecord {
    pub plan: Arc<NetworkPlan>,
    /// Version of the parameters that the forward pass used.
    pub version: u64,
    pub shapes: Vec<Shape>,
    pub kept: Kept,
}

/// The data that the backward pass reads, by backend.
pub(crate) enum Kept {
    Cpu(Activations<Cpu>),
    Tensors(Activations<Tensors>),
    #[cfg(feature = "cuda")]
    Cuda(Activations<Cuda>),
    GroupedCpu(Activations<Grouped<Cpu>>),
    GroupedTensors(Activations<Grouped<Tensors>>),
    #[cfg(feature = "cuda")]
    GroupedCuda(Activations<Grouped<Cuda>>),
}

pub(crate) struct Activations<B: Operations> {
    /// The values that the backward pass reads; the others are `None`.
    pub values: Vec<Option<B::Value>>,
    /// Further data of each operation.
    pub notes: Vec<Note<B>>,
}

pub(crate) enum Note<B: Operations> {
    Nothing,
    Normalised(B::Normalised),
    Argmax(B::Argmax),
}

impl Tape {
    /// Whether the tape holds no forward pass.
    pub fn is_empty(&self) -> bool {
        self.record.is_none()
    }

    /// Discards the forward pass, for a step that is abandoned.
    pub fn clear(&mut self) {
        *self = Tape::default();
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Result, Tensor};

    use crate::backend::{Backend, Cpu, Tensors};
    use crate::{BatchNorm, Builder, Convolution, Mode, Modes, Network, Pool, Sgd};

    fn touched(network: &Network) -> usize {
        match &network.0.backend {
            Backend::Cpu(cpu) => cpu.pool.touched(),
            other => panic!("a network on the CPU, not {}", other.id()),
        }
    }

    fn network() -> Result<Network> {
        let mut b = Builder::images(3);
        let c = Convolution { out_channels: 20, kernel: 3, stride: 1, padding: 1 };
        let norm = BatchNorm { epsilon: 1e-5, momentum: 0.1, relu: true, residual: None };
        b.block("stem");
        let x = b.input();
        let z = b.convolution("conv1", x, c)?;
        let y = b.batch_norm("bn1", z, norm)?;
        let y = b.max_pool(y, Pool { kernel: 2, stride: 2, padding: 0 })?;
        b.block("layer1");
        let z = b.convolution("conv2", y, c)?;
        let z = b.batch_norm("bn2", z, BatchNorm { residual: Some(y), ..norm })?;
        let y = b.global_average_pool(z)?;
        let y = b.linear("fc", y, 7)?;
        b.finish(y)
    }

    #[test]
    fn inputs_passed_together_give_the_same_and_leave_no_packed_weights() -> Result<()> {
        let kernels = network()?;
        for network in [kernels.by_tensor_operations(&Device::Cpu), kernels] {
            let parameters = network.parameters();
            let modes = Modes::all(&network, Mode::Batch);
            let large = Tensor::rand(-1f32, 1., (3, 6, 8, 3), &Device::Cpu)?;
            let small = Tensor::rand(-1f32, 1., (5, 4, 4, 3), &Device::Cpu)?;
            let (mut one_by_one, mut together) = (network.statistics(), network.statistics());
            let mut want = Vec::new();
            for input in [&large, &small] {
                let output = network.forward(&parameters, &mut one_by_one, input, &modes, None)?;
                want.push(output.to_vec2::<f32>()?);
            }
            let inputs = [&large, &small];
            let found = network.forward_each(&parameters, &mut together, &inputs, &modes)?;
            let found = found.iter().map(Tensor::to_vec2::<f32>).collect::<Result<Vec<_>>>()?;
            assert_eq!(found, want);
            assert_eq!(together.to_vec()?, one_by_one.to_vec()?);
            assert_eq!(parameters.packings(), 0);
        }
        Ok(())
    }

    #[test]
    fn training_keeps_no_large_packed_weights() -> Result<()> {
        let mut b = Builder::images(16);
        let of = |out_channels| Convolution { out_channels, kernel: 3, stride: 1, padding: 1 };
        b.block("all");
        let x = b.input();
        let x = b.convolution("small", x, of(512))?;
        let x = b.convolution("large", x, of(512))?;
        let x = b.global_average_pool(x)?;
        let network = b.finish(x)?;
        let (parameters, mut statistics) = (network.parameters(), network.statistics());
        let modes = Modes::all(&network, Mode::Batch);
        let input = Tensor::rand(-1f32, 1., (2, 4, 4, 16), &Device::Cpu)?;
        let mut tape = network.tape();
        let y = network.forward(&parameters, &mut statistics, &input, &modes, Some(&mut tape))?;
        assert_eq!(parameters.packings(), 1, "the small one");
        network.backward(&parameters, &mut tape, &y, &mut network.gradients(), true)?;
        assert_eq!(parameters.packings(), 2, "the small one of each pass");
        // A network that does not learn needs them for the next batch.
        network.forward(&parameters, &mut statistics, &input, &modes, None)?;
        assert_eq!(parameters.packings(), 3);
        Ok(())
    }

    /// The norms of the stem and of a block, of which the last adds a residual.
    #[test]
    fn a_norm_that_can_be_computed_again_is_not_kept() -> Result<()> {
        let network = network()?;
        let plan = &network.0;
        let of = |name: &str| {
            let operations = plan.operations.iter();
            operations.enumerate().find(|(_, o)| o.name == name).expect("an operation")
        };
        let ((bn1, stem), (bn2, block)) = (of("bn1"), of("bn2"));
        let (kept, recomputed) = (plan.kept::<Cpu>(), plan.recomputed::<Cpu>());
        assert_eq!((kept[stem.input], kept[stem.output]), (Some(bn1), None));
        assert_eq!((recomputed[stem.output], recomputed[block.output]), (Some(bn1), None));
        assert_eq!((kept[block.input], kept[block.output]), (Some(bn2), Some(bn2)));
        // Tensor operations keep what they have: the norm's input is in the note.
        assert_eq!(plan.recomputed::<Tensors>(), vec![None; plan.channels.len()]);
        assert_eq!(plan.kept::<Tensors>()[stem.output], Some(bn1));
        Ok(())
    }

    #[test]
    fn a_step_after_the_first_takes_its_memory_from_the_pool() -> Result<()> {
        let network = network()?;
        let (mut parameters, mut gradients) = (network.parameters(), network.gradients());
        let (mut statistics, mut momenta) = (network.statistics(), network.momenta());
        let modes = Modes::all(&network, Mode::Batch);
        let large = Tensor::rand(-1f32, 1., (18, 12, 10, 3), &Device::Cpu)?;
        let small = Tensor::rand(-1f32, 1., (5, 6, 8, 3), &Device::Cpu)?;
        let sgd = Sgd { learning_rate: 0.1, momentum: 0.9, weight_decay: 0. };
        let mut after = Vec::new();
        for _ in 0..4 {
            // Two crop sizes at once, and a pass that keeps nothing.
            let mut tapes = [network.tape(), network.tape()];
            let mut outputs = Vec::new();
            for (input, tape) in [&large, &small].into_iter().zip(&mut tapes) {
                let s = &mut statistics;
                outputs.push(network.forward(&parameters, s, input, &modes, Some(tape))?);
            }
            network.forward(&parameters, &mut statistics, &large, &modes, None)?;
            for (output, tape) in outputs.iter().zip(&mut tapes) {
                network.backward(&parameters, tape, output, &mut gradients, false)?;
                assert!(tape.is_empty());
            }
            parameters.sgd(&gradients, &mut momenta, sgd)?;
            gradients.zero();
            after.push(touched(&network));
        }
        assert!(after[0] > 100 << 10, "{after:?}");
        assert!(after.iter().all(|count| *count == after[0]), "{after:?}");
        Ok(())
    }
}
