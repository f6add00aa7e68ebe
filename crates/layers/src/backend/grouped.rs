//! The CPU backend over groups of a batch, which several ranks may share: see [`BatchGroups`].
//!
//! The kernels run once for every group, on values of their own. Only a batch norm on batch statistics
//! looks beyond a group: its sums are joined over all groups of all ranks.

use candle_core::{Result, Tensor};
use collective::tree;
use kernels::convolution::{Geometry, PackedFor};
use kernels::norm::{GradientSums, Moments, Normalisation};
use kernels::pooling::Window;
use kernels::{Buffer, Shape};
use rayon::prelude::*;

use super::{Cpu, NormCall, NormGradientCall, Operand, Operations, ProductCall};
use crate::Parameters;
use crate::flat::Changes;
use crate::groups::{BatchGroups, communicated};
use crate::plan::{Norm, Product};

/// The kernels, and the groups, which the threads compute side by side.
#[derive(Clone)]
pub(crate) struct Grouped {
    pub cpu: Cpu,
    pub groups: BatchGroups,
}

impl Grouped {
    /// The shape of each group of a value.
    fn shapes(&self, shape: Shape) -> Result<Vec<Shape>> {
        let groups = self.groups.of_own(shape.images)?;
        Ok(groups.iter().map(|images| Shape { images: images.len(), ..shape }).collect())
    }

    /// The geometry of each group.
    fn geometries(&self, g: &Geometry) -> Result<Vec<Geometry>> {
        let of = |input: Shape| Geometry {
            input,
            output: Shape { images: input.images, ..g.output },
            ..*g
        };
        Ok(self.shapes(g.input)?.into_iter().map(of).collect())
    }

    /// The windows of each group.
    fn windows(&self, w: &Window) -> Result<Vec<Window>> {
        let of = |input: Shape| Window {
            input,
            output: Shape { images: input.images, ..w.output },
            ..*w
        };
        Ok(self.shapes(w.input)?.into_iter().map(of).collect())
    }

    /// The moments of the whole batch, from those of the groups of this rank.
    fn moments(&self, groups: impl IntoIterator<Item = Moments>) -> Result<Moments> {
        let own = tree(groups, |lower, upper| lower.join(&upper)).unwrap_or_default();
        let mut numbers = numbers_of(&own);
        let join = |lower: &mut [f64], upper: &[f64]| {
            let mut joined = moments_of(lower);
            joined.join(&moments_of(upper));
            lower.copy_from_slice(&numbers_of(&joined));
        };
        communicated(self.groups.communicator().all_reduce(&mut numbers, join))?;
        Ok(moments_of(&numbers))
    }

    /// The gradient sums of the whole batch, from those of the groups of this rank.
    fn gradient_sums(&self, groups: &[GradientSums], batch: bool) -> Result<GradientSums> {
        let mut numbers = tree(groups.iter().map(numbers_of_sums), |lower, upper| {
            lower.iter_mut().zip(upper).for_each(|(lower, upper)| *lower += upper);
        })
        .unwrap_or_default();
        // On running statistics no gradient flows through them.
        if batch {
            communicated(self.groups.communicator().all_reduce_sum(&mut numbers))?;
        }
        let (plain, centred) = numbers[1..].split_at(numbers.len() / 2);
        let count = numbers[0] as usize;
        Ok(GradientSums { count, plain: plain.to_vec(), centred: centred.to_vec() })
    }
}

/// As numbers: count, means, squares.
fn numbers_of(moments: &Moments) -> Vec<f64> {
    let mut numbers = vec![moments.count as f64];
    numbers.extend(&moments.mean);
    numbers.extend(&moments.squares);
    numbers
}

fn moments_of(numbers: &[f64]) -> Moments {
    let (mean, squares) = numbers[1..].split_at(numbers.len() / 2);
    Moments { count: numbers[0] as usize, mean: mean.to_vec(), squares: squares.to_vec() }
}

/// As numbers: count, plain, centred.
fn numbers_of_sums(sums: &GradientSums) -> Vec<f64> {
    let mut numbers = vec![sums.count as f64];
    numbers.extend(&sums.plain);
    numbers.extend(&sums.centred);
    numbers
}

/// Computes every group of this rank. A small group has too little work for many threads, so the groups
/// themselves are shared by the threads.
fn each_group<T: Send, R: Send>(parts: Vec<T>, of_group: impl Fn(usize, T) -> R + Sync) -> Vec<R> {
    if parts.len() == 1 {
        return parts.into_iter().map(|part| of_group(0, part)).collect();
    }
    let parts = parts.into_par_iter().with_max_len(1).enumerate();
    parts.map(|(group, part)| of_group(group, part)).collect()
}

/// [`each_group`] that may fail.
fn try_each_group<T: Send, R: Send>(
    parts: Vec<T>,
    of_group: impl Fn(usize, T) -> Result<R> + Sync,
) -> Result<Vec<R>> {
    each_group(parts, of_group).into_iter().collect()
}

/// The part of each group, if there is a value.
fn part<T>(value: Option<&Vec<T>>, group: usize) -> Option<&T> {
    value.map(|value| &value[group])
}

/// The parts of the groups of a total; `None` for each without one.
fn parts(total: Option<Vec<Buffer>>, groups: usize) -> Vec<Option<Buffer>> {
    match total {
        Some(total) => total.into_iter().map(Some).collect(),
        None => (0..groups).map(|_| None).collect(),
    }
}

impl Operations for Grouped {
    type Value = Vec<Buffer>;
    type Sums = Vec<Buffer>;
    type Normalised = Normalisation;
    type Argmax = Vec<Buffer>;

    fn norm_reads(norm: &Norm) -> [bool; 2] {
        Cpu::norm_reads(norm)
    }

    fn load(&self, tensor: &Tensor, shape: Shape, what: &str) -> Result<Vec<Buffer>> {
        let groups = self.groups.of_own(shape.images)?.into_iter();
        let load = |images: std::ops::Range<usize>| {
            let rows = tensor.narrow(0, images.start, images.len())?;
            self.cpu.load(&rows, Shape { images: images.len(), ..shape }, what)
        };
        groups.map(load).collect()
    }

    fn unload(&self, value: &Vec<Buffer>, shape: Shape, dimensions: &[usize]) -> Result<Tensor> {
        let unload = |(group, shape): (&Buffer, Shape)| {
            let dimensions = [&[shape.images], &dimensions[1..]].concat();
            self.cpu.unload(group, shape, &dimensions)
        };
        let groups = value.iter().zip(self.shapes(shape)?).map(unload);
        Tensor::cat(&groups.collect::<Result<Vec<_>>>()?, 0)
    }

    fn product(&self, call: ProductCall<Self>) -> Result<(Vec<Buffer>, Option<Vec<Buffer>>)> {
        let geometries = self.geometries(&call.g)?;
        // Packed before the groups need them, so that no two of them pack the same weights.
        call.parameters.packed(call.product.weight, PackedFor::Forward, &geometries[0], &self.cpu);
        let outputs = try_each_group(geometries, |group, g| {
            self.cpu.product(ProductCall {
                product: call.product,
                g,
                parameters: call.parameters,
                input: &call.input[group],
                residual: part(call.residual, group),
                sums: call.sums,
            })
        })?;
        let (outputs, sums): (Vec<Buffer>, Vec<Option<Buffer>>) = outputs.into_iter().unzip();
        Ok((outputs, sums.into_iter().collect()))
    }

    fn weight_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        input: &Vec<Buffer>,
        gradient: &Vec<Buffer>,
        gradients: &mut Changes,
    ) -> Result<()> {
        let groups = self.geometries(g)?.into_iter().zip(gradients.groups()).collect();
        try_each_group(groups, |group, (g, mut gradients)| {
            let (input, gradient) = (&input[group], &gradient[group]);
            self.cpu.weight_gradient(product, &g, input, gradient, &mut gradients)
        })?;
        Ok(())
    }

    fn input_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        parameters: &Parameters,
        gradient: &Vec<Buffer>,
        total: Option<Vec<Buffer>>,
    ) -> Result<Vec<Buffer>> {
        let geometries = self.geometries(g)?;
        parameters.packed(product.weight, PackedFor::InputGradient, &geometries[0], &self.cpu);
        let totals = parts(total, gradient.len());
        try_each_group(geometries.into_iter().zip(totals).collect(), |group, (g, total)| {
            self.cpu.input_gradient(product, &g, parameters, &gradient[group], total)
        })
    }

    fn batch_norm(
        &self,
        mut call: NormCall<Self>,
        input: Operand<Vec<Buffer>>,
        statistics: &mut Changes,
    ) -> Result<(Vec<Buffer>, Normalisation)> {
        let shapes = self.shapes(call.shape)?;
        let sums = parts(call.sums.take(), shapes.len());
        let read = match &input {
            Operand::Borrowed(input) => input,
            Operand::Owned(input) => input,
        };
        let moments = if call.batch {
            let moments =
                each_group(sums, |group, sums| self.cpu.moments(shapes[group], &read[group], sums));
            Some(self.moments(moments)?)
        } else {
            None
        };
        let n = Cpu::normalisation(call.norm, call.shape, moments, statistics);
        let normalise = |group: usize, input: Operand<Buffer>| {
            self.cpu.normalise(&call_of_group(&call, shapes[group], group), input, &n)
        };
        let output = match input {
            Operand::Borrowed(input) => {
                let input = input.iter().map(Operand::Borrowed).collect();
                each_group(input, normalise)
            }
            Operand::Owned(input) => {
                each_group(input.into_iter().map(Operand::Owned).collect(), normalise)
            }
        };
        Ok((output, n))
    }

    fn batch_norm_gradients(
        &self,
        call: NormGradientCall<Self>,
        mut gradient: Vec<Buffer>,
        gradients: &mut Changes,
    ) -> Result<[Option<Vec<Buffer>>; 2]> {
        let shapes = self.shapes(call.shape)?;
        let of_group = |group: usize| gradient_call_of_group(&call, shapes[group], group);
        let sums = each_group(gradient.iter_mut().collect(), |group, gradient| {
            self.cpu.gradient_sums(&of_group(group), gradient)
        });
        if call.trained {
            for (sums, mut gradients) in sums.iter().zip(gradients.groups()) {
                Cpu::norm_weight_gradients(&call, sums, &mut gradients);
            }
        }
        let all = self.gradient_sums(&sums, call.normalised.batch)?;
        let mut found = [const { Vec::new() }; 2];
        let of_groups = each_group(gradient, |group, gradient| {
            self.cpu.norm_value_gradients(&of_group(group), &all, gradient)
        });
        for of_group in of_groups {
            found.iter_mut().zip(of_group).for_each(|(found, part)| found.extend(part));
        }
        Ok(found.map(|found| (!found.is_empty()).then_some(found)))
    }

    fn relu(&self, shape: Shape, input: &Vec<Buffer>) -> Result<Vec<Buffer>> {
        try_each_group(self.shapes(shape)?, |group, shape| self.cpu.relu(shape, &input[group]))
    }

    fn relu_gradient(
        &self,
        shape: Shape,
        output: &Vec<Buffer>,
        gradient: Vec<Buffer>,
    ) -> Result<Vec<Buffer>> {
        let groups = self.shapes(shape)?.into_iter().zip(gradient).collect();
        try_each_group(groups, |group, (shape, gradient)| {
            self.cpu.relu_gradient(shape, &output[group], gradient)
        })
    }

    fn max_pool(&self, w: &Window, input: &Vec<Buffer>) -> Result<(Vec<Buffer>, Vec<Buffer>)> {
        let pooled =
            try_each_group(self.windows(w)?, |group, w| self.cpu.max_pool(&w, &input[group]))?;
        Ok(pooled.into_iter().unzip())
    }

    fn max_pool_gradient(
        &self,
        w: &Window,
        argmax: &Vec<Buffer>,
        gradient: &Vec<Buffer>,
        total: Option<Vec<Buffer>>,
    ) -> Result<Vec<Buffer>> {
        let (windows, totals) = (self.windows(w)?, parts(total, gradient.len()));
        try_each_group(totals, |group, total| {
            let (argmax, gradient) = (&argmax[group], &gradient[group]);
            self.cpu.max_pool_gradient(&windows[group], argmax, gradient, total)
        })
    }

    fn average_pool(&self, input_shape: Shape, input: &Vec<Buffer>) -> Result<Vec<Buffer>> {
        try_each_group(self.shapes(input_shape)?, |group, shape| {
            self.cpu.average_pool(shape, &input[group])
        })
    }

    fn average_pool_gradient(
        &self,
        input_shape: Shape,
        gradient: &Vec<Buffer>,
        total: Option<Vec<Buffer>>,
    ) -> Result<Vec<Buffer>> {
        let (shapes, totals) = (self.shapes(input_shape)?, parts(total, gradient.len()));
        try_each_group(totals, |group, total| {
            self.cpu.average_pool_gradient(shapes[group], &gradient[group], total)
        })
    }

    fn add(&self, shape: Shape, gradient: Vec<Buffer>, total: Vec<Buffer>) -> Result<Vec<Buffer>> {
        let groups = self.shapes(shape)?.into_iter().zip(gradient).zip(total).collect();
        try_each_group(groups, |_, ((shape, gradient), total)| self.cpu.add(shape, gradient, total))
    }
}

fn call_of_group<'a>(
    call: &NormCall<'a, Grouped>,
    shape: Shape,
    group: usize,
) -> NormCall<'a, Cpu> {
    let NormCall { norm, batch, parameters, residual, .. } = *call;
    NormCall { norm, shape, batch, parameters, residual: part(residual, group), sums: None }
}

fn gradient_call_of_group<'a>(
    call: &NormGradientCall<'a, Grouped>,
    shape: Shape,
    group: usize,
) -> NormGradientCall<'a, Cpu> {
    NormGradientCall {
        norm: call.norm,
        shape,
        parameters: call.parameters,
        trained: call.trained,
        wanted: call.wanted,
        normalised: call.normalised,
        input: part(call.input, group),
        output: part(call.output, group),
    }
}
