//! Networks for inference: batch norms are folded into the weights before them.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::backend::{Backend, BackendId, Cpu};
use crate::flat::{EntryKind, Flat, FlatLayout, TensorEntry};
use crate::network::Network;
use crate::plan::{NetworkOperation, NetworkPlan, Norm, OperationWork, Product, Uses};
use crate::{Mode, Modes, Parameters, Statistics};

/// A network with its numbers, for inference: on running statistics and without a tape.
///
/// A batch norm that is the only reader of a convolution or a linear layer is folded into it (Jacob et
/// al. 2018, arXiv:1712.05877, section 3.2): with mean `μ`, variance `σ²`, factor `γ` and shift `β` of
/// a channel,
///
/// `w' = w · γ / √(σ² + ε)`, `b' = β + (b − μ) · γ / √(σ² + ε)`,
///
/// computed in f64, and the residual sum and the ReLU become the last step of the product. A ResNet is
/// reduced to convolutions and pools. Results differ from those of [`Network::forward`] only by
/// rounding. Memory is reused from call to call.
///
/// Only networks on the CPU kernels are folded; on other backends the network is used unchanged.
#[derive(Clone)]
pub struct Inference {
    network: Network,
    parameters: Parameters,
    statistics: Statistics,
    /// Versions of the parameters and statistics it was made from.
    of: (u64, u64),
}

impl Network {
    /// This network with a copy of these numbers, for inference. Numbers of another network or backend
    /// are an error.
    pub fn inference(&self, parameters: &Parameters, statistics: &Statistics) -> Result<Inference> {
        parameters.check_plan(&self.0)?;
        statistics.check_plan(&self.0)?;
        let of = (parameters.version(), statistics.version());
        let (network, parameters, statistics) = match self.0.backend.whole() {
            Backend::Cpu(cpu) => fold(&self.0, &cpu, parameters, statistics)?,
            _ => (self.clone(), parameters.to(self)?, statistics.to(self)?),
        };
        Ok(Inference { network, parameters, statistics, of })
    }
}

impl Inference {
    /// The output (N, D), f32, as [`Network::forward`] with running statistics: each row depends on its
    /// own input alone.
    ///
    /// # Errors
    ///
    /// The input has another type, shape or device; a map has no pixel left.
    pub fn forward(&mut self, input: &Tensor) -> Result<Tensor> {
        let Self { network, parameters, statistics, .. } = self;
        let modes = Modes::all(network, Mode::Running);
        network.forward(parameters, statistics, input, &modes, None)
    }

    /// Whether these numbers are the ones it was made from, unchanged.
    pub fn is_current(&self, parameters: &Parameters, statistics: &Statistics) -> bool {
        self.of == (parameters.version(), statistics.version())
    }
}

/// Entries under construction, with their numbers.
#[derive(Default)]
struct FlatBuilder {
    layout: FlatLayout,
    numbers: Vec<f32>,
}

impl FlatBuilder {
    fn push(
        &mut self,
        name: String,
        shape: Vec<usize>,
        kind: EntryKind,
        block: usize,
        numbers: &[f32],
    ) -> Result<usize> {
        self.numbers.extend_from_slice(numbers);
        self.layout.push(name, shape, kind, block)
    }

    /// Copies an entry.
    fn copy(&mut self, flat: &Flat, entry: usize) -> Result<usize> {
        let numbers = flat.slice(entry);
        let TensorEntry { name, shape, kind, block, .. } = flat.layout.entries[entry].clone();
        self.push(name, shape, kind, block, numbers)
    }

    fn finish(self) -> Flat {
        Flat::with(&Arc::new(self.layout), BackendId::Cpu, self.numbers)
    }
}

fn fold(
    plan: &NetworkPlan,
    cpu: &Cpu,
    parameters: &Parameters,
    statistics: &Statistics,
) -> Result<(Network, Parameters, Statistics)> {
    let (mut operations, mut weights, mut running) =
        (Vec::new(), FlatBuilder::default(), FlatBuilder::default());
    for operation in &plan.operations {
        match &operation.work {
            OperationWork::Product(_) if following_norm(plan, operation).is_some() => {}
            OperationWork::Product(product) => {
                let work = folded(operation, product, None, parameters, statistics, &mut weights)?;
                operations.push(NetworkOperation { work, ..operation.clone() });
            }
            OperationWork::BatchNorm(norm) => match folding_product(plan, operation) {
                // At the position of the norm: its residual may be computed after the product.
                Some((before, product)) => {
                    let work =
                        folded(before, product, Some(norm), parameters, statistics, &mut weights)?;
                    let (name, input) = (before.name.clone(), before.input);
                    operations.push(NetworkOperation { name, input, work, ..operation.clone() });
                }
                None => {
                    let work = OperationWork::BatchNorm(Norm {
                        weight: weights.copy(parameters.flat(), norm.weight)?,
                        bias: weights.copy(parameters.flat(), norm.bias)?,
                        running_mean: running.copy(&statistics.flat, norm.running_mean)?,
                        running_variance: running.copy(&statistics.flat, norm.running_variance)?,
                        ..norm.clone()
                    });
                    operations.push(NetworkOperation { work, ..operation.clone() });
                }
            },
            OperationWork::Relu | OperationWork::MaxPool { .. } | OperationWork::AveragePool => {
                operations.push(operation.clone());
            }
        }
    }
    let Uses { last_use, feeds_norm } = Uses::of(&operations, plan.channels.len(), plan.output);
    let (weights, running) = (weights.finish(), running.finish());
    let plan = Arc::new(NetworkPlan {
        operations,
        parameters: Arc::clone(&weights.layout),
        statistics: Arc::clone(&running.layout),
        backend: Backend::Cpu(Cpu::new(cpu.variant, cpu.precision)),
        last_use,
        feeds_norm,
        ..plan.clone()
    });
    let parameters = Parameters::of_flat(&plan, weights, vec![true; plan.blocks.len()]);
    Ok((Network(plan), parameters, Statistics::of_flat(running)))
}

/// The batch norm that a product is folded with: the only reader of its output.
fn following_norm<'a>(
    plan: &'a NetworkPlan,
    product: &NetworkOperation,
) -> Option<&'a NetworkOperation> {
    let reads = |operation: &&NetworkOperation| {
        let residual = match &operation.work {
            OperationWork::BatchNorm(norm) => norm.residual,
            _ => None,
        };
        operation.input == product.output || residual == Some(product.output)
    };
    let mut readers = plan.operations.iter().filter(reads);
    let (first, second) = (readers.next()?, readers.next());
    let residual_is_another = match &first.work {
        OperationWork::BatchNorm(norm) => norm.residual != Some(product.output),
        _ => false,
    };
    (residual_is_another && second.is_none() && plan.output != product.output).then_some(first)
}

/// The product that a batch norm is folded into.
fn folding_product<'a>(
    plan: &'a NetworkPlan,
    norm: &NetworkOperation,
) -> Option<(&'a NetworkOperation, &'a Product)> {
    let before = plan.operations.iter().find(|operation| operation.output == norm.input)?;
    let OperationWork::Product(product) = &before.work else { return None };
    following_norm(plan, before).map(|_| (before, product))
}

/// A product with the norm that follows it folded in, if there is one.
fn folded(
    operation: &NetworkOperation,
    product: &Product,
    norm: Option<&Norm>,
    parameters: &Parameters,
    statistics: &Statistics,
    flat: &mut FlatBuilder,
) -> Result<OperationWork> {
    let entry = &parameters.entries()[product.weight];
    let outputs = entry.shape[0];
    let mut weights = parameters.slice(product.weight).to_vec();
    let mut biases = product.bias.map(|bias| parameters.slice(bias).to_vec());
    if let Some(norm) = norm {
        let before = biases.unwrap_or_else(|| vec![0.; outputs]);
        let mut shifts = Vec::with_capacity(outputs);
        for (channel, weights) in weights.chunks_exact_mut(entry.range.len() / outputs).enumerate()
        {
            let of = |numbers: &[f32]| f64::from(numbers[channel]);
            let variance = of(statistics.flat.slice(norm.running_variance));
            let factor = of(parameters.slice(norm.weight)) / (variance + norm.epsilon).sqrt();
            let mean = of(statistics.flat.slice(norm.running_mean));
            let shift = of(parameters.slice(norm.bias)) + (of(&before) - mean) * factor;
            shifts.push(shift as f32);
            for weight in weights {
                *weight = (f64::from(*weight) * factor) as f32;
            }
        }
        biases = Some(shifts);
    }
    let (name, block) = (&operation.name, operation.block);
    let weight =
        flat.push(format!("{name}.weight"), entry.shape.clone(), entry.kind, block, &weights)?;
    let mut push_bias = |biases: Vec<f32>| {
        flat.push(format!("{name}.bias"), vec![outputs], EntryKind::LinearBias, block, &biases)
    };
    let bias = biases.map(&mut push_bias).transpose()?;
    let (relu, residual) = norm.map_or((false, None), |norm| (norm.relu, norm.residual));
    Ok(OperationWork::Product(Product { weight, bias, relu, residual, ..product.clone() }))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use kernels::Precision;

    use super::*;
    use crate::{BatchNorm, Builder, Convolution, Pool};

    /// Norms in every position: after a convolution, with a residual computed later, after a linear
    /// layer; and two that cannot be folded, after a pool and after a convolution with a second reader.
    fn network() -> Result<Network> {
        let mut b = Builder::images(3);
        let three = |stride| Convolution { out_channels: 20, kernel: 3, stride, padding: 1 };
        let norm = BatchNorm { epsilon: 1e-5, momentum: 0.1, relu: true, residual: None };
        b.block("stem");
        let x = b.input();
        let z = b.convolution("conv1", x, three(1))?;
        let y = b.batch_norm("bn1", z, norm)?;
        let y = b.max_pool(y, Pool { kernel: 2, stride: 2, padding: 0 })?;
        b.block("layer1");
        let z = b.convolution("conv2", y, three(2))?;
        let one = Convolution { kernel: 1, padding: 0, ..three(2) };
        let short = b.convolution("down", y, one)?;
        let short = b.batch_norm("bn_down", short, BatchNorm { relu: false, ..norm })?;
        let y = b.batch_norm("bn2", z, BatchNorm { residual: Some(short), ..norm })?;
        let z = b.convolution("conv3", y, three(1))?;
        let y = b.batch_norm("bn3", z, BatchNorm { residual: Some(z), ..norm })?;
        let y = b.global_average_pool(y)?;
        b.block("head");
        let y = b.batch_norm("bn4", y, norm)?;
        let y = b.linear("hidden", y, 33)?;
        let y = b.batch_norm("bn5", y, norm)?;
        let y = b.linear("output", y, 7)?;
        b.finish(y)
    }

    fn numbers(network: &Network) -> Result<(Parameters, Statistics)> {
        let (mut parameters, mut statistics) = (network.parameters(), network.statistics());
        let wave = |entry: &TensorEntry, centre: f32, spread: f32| -> Vec<f32> {
            let salt = entry.range.start as f32;
            let value = |i: usize| centre + spread * (0.7 * i as f32 + salt).sin();
            (0..entry.range.len()).map(value).collect()
        };
        for entry in parameters.entries().to_vec() {
            let fan_in = entry.shape[1..].iter().product::<usize>() as f32;
            let (centre, spread) = match entry.kind {
                EntryKind::NormWeight => (1., 0.5),
                EntryKind::NormBias | EntryKind::LinearBias => (0., 0.4),
                _ => (0., (3. / fan_in).sqrt()),
            };
            parameters.set(&entry.name, &wave(&entry, centre, spread))?;
        }
        for entry in statistics.entries().to_vec() {
            let mean = entry.kind == EntryKind::RunningMean;
            let values = if mean { wave(&entry, 0.2, 0.5) } else { wave(&entry, 1.2, 0.9) };
            statistics.set(&entry.name, &values)?;
        }
        Ok((parameters, statistics))
    }

    fn touched(inference: &Inference) -> usize {
        match &inference.network.0.backend {
            Backend::Cpu(cpu) => cpu.pool.touched(),
            other => panic!("a network on the CPU, not {}", other.id()),
        }
    }

    fn pictures() -> Result<Tensor> {
        let values: Vec<f32> = (0..5 * 11 * 8 * 3).map(|i| (0.37 * i as f32).sin()).collect();
        Tensor::from_vec(values, (5, 11, 8, 3), &Device::Cpu)
    }

    fn unfolded(network: &Network, p: &Parameters, s: &Statistics) -> Result<Vec<f32>> {
        let modes = Modes::all(network, Mode::Running);
        network.forward(p, &mut s.clone(), &pictures()?, &modes, None)?.flatten_all()?.to_vec1()
    }

    /// Largest difference, relative to the largest number.
    fn off(found: &[f32], want: &[f32]) -> f32 {
        let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0f32, f32::max);
        let off = largest(&mut found.iter().zip(want).map(|(a, b)| (a - b).abs()));
        off / largest(&mut want.iter().map(|x| x.abs()))
    }

    #[test]
    fn folding_changes_results_by_rounding_alone() -> Result<()> {
        let network = network()?;
        let (parameters, statistics) = numbers(&network)?;
        let exact = unfolded(&network, &parameters, &statistics)?;
        for (precision, bound) in [(Precision::F32, 1e-5), (Precision::Bf16, 0.02)] {
            let network = network.with_precision(precision);
            let plain = unfolded(&network, &parameters, &statistics)?;
            assert!(off(&plain, &exact) < bound, "{precision:?} {}", off(&plain, &exact));
            let mut inference = network.inference(&parameters, &statistics)?;
            let folded = inference.forward(&pictures()?)?.flatten_all()?.to_vec1()?;
            assert!(off(&folded, &exact) < bound, "{precision:?} {}", off(&folded, &exact));
            assert!(folded != plain, "nothing was folded");
            let left = inference.statistics.entries().iter().map(|e| e.name.as_str());
            let want =
                ["bn3.running_mean", "bn3.running_var", "bn4.running_mean", "bn4.running_var"];
            assert_eq!(left.collect::<Vec<_>>(), want, "all others are folded");
        }
        Ok(())
    }

    #[test]
    fn a_row_depends_on_itself_alone_and_calls_reuse_memory() -> Result<()> {
        let network = network()?;
        let (parameters, statistics) = numbers(&network)?;
        let mut inference = network.inference(&parameters, &statistics)?;
        let all = inference.forward(&pictures()?)?;
        // The first call caches packed weights in memory of the pool, so the second allocates too.
        inference.forward(&pictures()?)?;
        let before = touched(&inference);
        let again = inference.forward(&pictures()?)?;
        assert_eq!(touched(&inference), before);
        assert_eq!(all.to_vec2::<f32>()?, again.to_vec2::<f32>()?);
        let alone = inference.forward(&pictures()?.narrow(0, 3, 1)?)?;
        assert_eq!(alone.to_vec2::<f32>()?[0], all.to_vec2::<f32>()?[3]);
        Ok(())
    }

    #[test]
    fn a_folded_network_has_no_backward_pass() -> Result<()> {
        let network = network()?;
        let (parameters, statistics) = numbers(&network)?;
        let Inference { network, parameters, mut statistics, .. } =
            network.inference(&parameters, &statistics)?;
        let (modes, mut tape) = (Modes::all(&network, Mode::Running), network.tape());
        let tape = &mut tape;
        let y = network.forward(&parameters, &mut statistics, &pictures()?, &modes, Some(tape))?;
        let error = network.backward(&parameters, tape, &y, &mut network.gradients(), false);
        let message = error.expect_err("a bias, a ReLU or a residual would be lost").to_string();
        assert!(message.contains("`hidden`") && message.contains("folded"), "{message}");
        Ok(())
    }

    #[test]
    fn it_is_current_until_a_number_changes() -> Result<()> {
        let network = network()?;
        let (mut parameters, mut statistics) = numbers(&network)?;
        let inference = network.inference(&parameters, &statistics)?;
        assert!(inference.is_current(&parameters, &statistics));
        let modes = Modes::all(&network, Mode::Batch);
        network.forward(&parameters, &mut statistics, &pictures()?, &modes, None)?;
        assert!(!inference.is_current(&parameters, &statistics), "running statistics have moved");
        let inference = network.inference(&parameters, &statistics)?;
        parameters.set("output.bias", &[0.5; 7])?;
        assert!(!inference.is_current(&parameters, &statistics), "a parameter was set");
        let other = Builder::features(2);
        let other = {
            let input = other.input();
            other.finish(input)?
        };
        assert!(other.inference(&parameters, &statistics).is_err());
        Ok(())
    }
}
