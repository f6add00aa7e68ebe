//! A network in use rather than in training: batch norms become part of the weights before them.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use crate::flat::{Entry, Flat, Kind, Layout};
use crate::network::Network;
use crate::plan::{Norm, Operation, Plan, Uses, Work};
use crate::{Mode, Modes, Parameters, Statistics};

/// A network with its numbers, as it is used and not trained: on running statistics and without a
/// tape.
///
/// A batch norm that alone reads a convolution or a linear layer is folded into it (Jacob et al.
/// 2018, arXiv:1712.05877, section 3.2): with mean `μ`, variance `σ²`, factor `γ` and shift `β` of a
/// channel,
///
/// `w' = w · γ / √(σ² + ε)`, `b' = β + (b − μ) · γ / √(σ² + ε)`,
///
/// computed in f64, and the residual sum and the ReLU become the last step of the product. What is
/// left of a ResNet are convolutions and pools. Results differ from those of
/// [`Network::forward`] by rounding alone. Memory is kept from one call to the next.
///
/// A network on a device of candle's is taken as it is.
#[derive(Clone)]
pub struct Inference {
    network: Network,
    parameters: Parameters,
    statistics: Statistics,
    /// Versions of the numbers that it was made from.
    of: (u64, u64),
}

impl Network {
    /// This network with these numbers, ready for use; later changes of them are not seen.
    ///
    /// # Errors
    ///
    /// The numbers belong to another network, or their device fails.
    pub fn inference(&self, parameters: &Parameters, statistics: &Statistics) -> Result<Inference> {
        parameters.check_plan(&self.0)?;
        statistics.check_plan(&self.0)?;
        let of = (parameters.version(), statistics.version());
        let (network, parameters, statistics) = match self.0.place {
            Some(_) => (self.clone(), parameters.to(self)?, statistics.to(self)?),
            None => folded(&self.0, parameters, statistics)?,
        };
        Ok(Inference { network, parameters, statistics, of })
    }
}

impl Inference {
    /// The output (N, D) of every row of `input`, f32: as [`Network::forward`] with running
    /// statistics, each row by itself.
    ///
    /// # Errors
    ///
    /// The input has another type, extent or device; a map becomes empty.
    pub fn forward(&mut self, input: &Tensor) -> Result<Tensor> {
        let Self { network, parameters, statistics, .. } = self;
        let modes = Modes::all(network, Mode::Running);
        network.forward(parameters, statistics, input, &modes, None)
    }

    /// Whether it was made from these numbers as they are now.
    pub fn is_of(&self, parameters: &Parameters, statistics: &Statistics) -> bool {
        self.of == (parameters.version(), statistics.version())
    }
}

/// A plan under way, with the numbers of its entries.
#[derive(Default)]
struct Numbers {
    layout: Layout,
    values: Vec<f32>,
}

impl Numbers {
    fn push(
        &mut self,
        name: String,
        shape: Vec<usize>,
        kind: Kind,
        block: usize,
        values: &[f32],
    ) -> Result<usize> {
        self.values.extend_from_slice(values);
        self.layout.push(name, shape, kind, block)
    }

    fn keep(&mut self, entry: &Entry, values: &[f32]) -> Result<usize> {
        self.push(entry.name.clone(), entry.shape.clone(), entry.kind, entry.block, values)
    }

    /// The layout, and the numbers on the CPU.
    fn finish(self) -> (Arc<Layout>, Flat) {
        let layout = Arc::new(self.layout);
        let flat = Flat::with(&layout, None, Some(self.values));
        (layout, flat)
    }
}

fn folded(
    plan: &Plan,
    parameters: &Parameters,
    statistics: &Statistics,
) -> Result<(Network, Parameters, Statistics)> {
    let (mut operations, mut numbers, mut running) =
        (Vec::new(), Numbers::default(), Numbers::default());
    for operation in &plan.operations {
        let work = match &operation.work {
            Work::Product { .. } if norm_behind(plan, operation).is_some() => continue,
            Work::Product { .. } => {
                let work = product(operation, None, parameters, statistics, &mut numbers)?;
                operations.push(Operation { work, ..operation.clone() });
                continue;
            }
            Work::BatchNorm(norm) => match product_before(plan, operation) {
                // At the place of the norm: its residual may be made after the product.
                Some(before) => {
                    let work = product(before, Some(norm), parameters, statistics, &mut numbers)?;
                    let (name, input) = (before.name.clone(), before.input);
                    operations.push(Operation { name, input, work, ..operation.clone() });
                    continue;
                }
                None => {
                    let mut keep_parameter = |entry: usize| {
                        numbers.keep(&parameters.entries()[entry], parameters.of(entry))
                    };
                    let mut keep_statistic = |entry: usize| {
                        running.keep(&statistics.entries()[entry], statistics.of(entry))
                    };
                    Work::BatchNorm(Norm {
                        weight: keep_parameter(norm.weight)?,
                        bias: keep_parameter(norm.bias)?,
                        running_mean: keep_statistic(norm.running_mean)?,
                        running_variance: keep_statistic(norm.running_variance)?,
                        ..norm.clone()
                    })
                }
            },
            Work::Relu | Work::MaxPool { .. } | Work::AveragePool => operation.work.clone(),
        };
        operations.push(Operation { work, ..operation.clone() });
    }
    let Uses { last_use, kept, feeds_norm } =
        Uses::of(&operations, plan.channels.len(), plan.output);
    let (layout, values) = numbers.finish();
    let (statistics_layout, running) = running.finish();
    let plan = Arc::new(Plan {
        operations,
        parameters: layout,
        statistics: statistics_layout,
        last_use,
        kept,
        feeds_norm,
        pool: kernels::BufferPool::new(),
        ..plan.clone()
    });
    let parameters = Parameters::of_flat(&plan, values, vec![true; plan.blocks.len()]);
    Ok((Network(plan), parameters, Statistics::of_flat(running)))
}

/// The batch norm that a product is folded with: the one that alone reads its output.
fn norm_behind<'a>(plan: &'a Plan, product: &Operation) -> Option<&'a Operation> {
    let reads = |operation: &&Operation| {
        let residual = match &operation.work {
            Work::BatchNorm(norm) => norm.residual,
            _ => None,
        };
        operation.input == product.output || residual == Some(product.output)
    };
    let mut readers = plan.operations.iter().filter(reads);
    let (first, second) = (readers.next()?, readers.next());
    let residual_is_another = match &first.work {
        Work::BatchNorm(norm) => norm.residual != Some(product.output),
        _ => false,
    };
    (residual_is_another && second.is_none() && plan.output != product.output).then_some(first)
}

/// The product that a batch norm is folded into.
fn product_before<'a>(plan: &'a Plan, norm: &Operation) -> Option<&'a Operation> {
    let product = plan.operations.iter().find(|operation| operation.output == norm.input)?;
    let is_product = matches!(product.work, Work::Product { .. });
    (is_product && norm_behind(plan, product).is_some()).then_some(product)
}

/// A product with its numbers, and with the norm behind it where there is one.
fn product(
    operation: &Operation,
    norm: Option<&Norm>,
    parameters: &Parameters,
    statistics: &Statistics,
    numbers: &mut Numbers,
) -> Result<Work> {
    let Work::Product { weight, bias, .. } = operation.work else {
        unreachable!("only products are folded")
    };
    let entry = &parameters.entries()[weight];
    let outputs = entry.shape[0];
    let (mut weights, mut biases) =
        (parameters.of(weight).to_vec(), bias.map(|bias| parameters.of(bias).to_vec()));
    if let Some(norm) = norm {
        let before = biases.unwrap_or_else(|| vec![0.; outputs]);
        let mut shifts = Vec::with_capacity(outputs);
        for (channel, weights) in weights.chunks_exact_mut(entry.range.len() / outputs).enumerate()
        {
            let of = |entry: &[f32]| f64::from(entry[channel]);
            let variance = of(statistics.of(norm.running_variance));
            let factor = of(parameters.of(norm.weight)) / (variance + norm.epsilon).sqrt();
            let mean = of(statistics.of(norm.running_mean));
            let shift = of(parameters.of(norm.bias)) + (of(&before) - mean) * factor;
            shifts.push(shift as f32);
            for weight in weights {
                *weight = (f64::from(*weight) * factor) as f32;
            }
        }
        biases = Some(shifts);
    }
    let (name, block) = (&operation.name, operation.block);
    let new_weight =
        numbers.push(format!("{name}.weight"), entry.shape.clone(), entry.kind, block, &weights)?;
    let mut push_bias = |values: Vec<f32>| {
        numbers.push(format!("{name}.bias"), vec![outputs], Kind::LinearBias, block, &values)
    };
    let new_bias = biases.map(&mut push_bias).transpose()?;
    let mut work = operation.work.clone();
    if let Work::Product { weight, bias, relu, residual, .. } = &mut work {
        (*weight, *bias) = (new_weight, new_bias);
        (*relu, *residual) = norm.map_or((false, None), |norm| (norm.relu, norm.residual));
    }
    Ok(work)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use kernels::Precision;

    use super::*;
    use crate::{BatchNorm, Builder, Convolution, Pool};

    /// Every way in which a norm can stand: behind a convolution, with a residual made after that,
    /// behind a linear layer; and two that cannot be folded, behind a pool and behind a convolution
    /// that something else reads too.
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
        let wave = |entry: &Entry, centre: f32, spread: f32| -> Vec<f32> {
            let salt = entry.range.start as f32;
            let value = |i: usize| centre + spread * (0.7 * i as f32 + salt).sin();
            (0..entry.range.len()).map(value).collect()
        };
        for entry in parameters.entries().to_vec() {
            let fan_in = entry.shape[1..].iter().product::<usize>() as f32;
            let (centre, spread) = match entry.kind {
                Kind::NormWeight => (1., 0.5),
                Kind::NormBias | Kind::LinearBias => (0., 0.4),
                _ => (0., (3. / fan_in).sqrt()),
            };
            parameters.set(&entry.name, &wave(&entry, centre, spread))?;
        }
        for entry in statistics.entries().to_vec() {
            let mean = entry.kind == Kind::RunningMean;
            let values = if mean { wave(&entry, 0.2, 0.5) } else { wave(&entry, 1.2, 0.9) };
            statistics.set(&entry.name, &values)?;
        }
        Ok((parameters, statistics))
    }

    fn pictures() -> Result<Tensor> {
        let values: Vec<f32> = (0..5 * 11 * 8 * 3).map(|i| (0.37 * i as f32).sin()).collect();
        Tensor::from_vec(values, (5, 11, 8, 3), &Device::Cpu)
    }

    fn unfolded(network: &Network, p: &Parameters, s: &Statistics) -> Result<Vec<f32>> {
        let modes = Modes::all(network, Mode::Running);
        network.forward(p, &mut s.clone(), &pictures()?, &modes, None)?.flatten_all()?.to_vec1()
    }

    /// Largest difference, as a share of the largest number.
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
    fn a_row_is_by_itself_and_a_call_takes_its_memory_from_the_one_before() -> Result<()> {
        let network = network()?;
        let (parameters, statistics) = numbers(&network)?;
        let mut inference = network.inference(&parameters, &statistics)?;
        let all = inference.forward(&pictures()?)?;
        // The first call keeps packed weights of what it took, so that the second takes some more.
        inference.forward(&pictures()?)?;
        let allocations = inference.network.0.pool.allocations();
        let again = inference.forward(&pictures()?)?;
        assert_eq!(inference.network.0.pool.allocations(), allocations);
        assert_eq!(all.to_vec2::<f32>()?, again.to_vec2::<f32>()?);
        let alone = inference.forward(&pictures()?.narrow(0, 3, 1)?)?;
        assert_eq!(alone.to_vec2::<f32>()?[0], all.to_vec2::<f32>()?[3]);
        Ok(())
    }

    #[test]
    fn it_knows_which_numbers_it_was_made_from() -> Result<()> {
        let network = network()?;
        let (mut parameters, mut statistics) = numbers(&network)?;
        let inference = network.inference(&parameters, &statistics)?;
        assert!(inference.is_of(&parameters, &statistics));
        let modes = Modes::all(&network, Mode::Batch);
        network.forward(&parameters, &mut statistics, &pictures()?, &modes, None)?;
        assert!(!inference.is_of(&parameters, &statistics), "running statistics have moved");
        let inference = network.inference(&parameters, &statistics)?;
        parameters.set("output.bias", &[0.5; 7])?;
        assert!(!inference.is_of(&parameters, &statistics), "a parameter was set");
        let other = Builder::features(2);
        let other = {
            let input = other.input();
            other.finish(input)?
        };
        assert!(other.inference(&parameters, &statistics).is_err());
        Ok(())
    }
}
