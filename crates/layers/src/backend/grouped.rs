//! A backend over groups of a batch, which several ranks may share: see [`BatchGroups`].
//!
//! The operations run once for every group, on values of their own. Only a batch norm on batch statistics
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

/// A backend, and the groups that it computes one by one.
#[derive(Clone)]
pub(crate) struct Grouped<B> {
    pub backend: B,
    pub groups: BatchGroups,
}

/// A backend that can compute a batch in groups: its batch norm is made of steps between which sums over the
/// groups are joined.
pub(crate) trait Divisible:
    Operations<Value: Send + Sync, Sums: Send, Normalised: Sync, Argmax: Send + Sync> + Sync
{
    /// Count, mean and squared deviations of each channel of a norm's input.
    type Moments: Send;
    /// Mean and deviation, the same for all groups.
    type Normalisation: Sync;
    /// The data that each group keeps for the backward pass of a norm.
    type Kept: Send + Sync;
    /// Sums of a norm's backward pass.
    type GradientSums: Send + Sync;

    /// Whether threads compute groups side by side. A small group has too little work for many threads.
    const SIDE_BY_SIDE: bool;

    /// Prepares the weights of a product, so that no two groups do the same.
    fn prepare(&self, _: PackedFor, _: &Product, _: &Geometry, _: &Parameters) {}

    /// The moments of a group, from the sums that the preceding product has computed, if it has.
    fn moments(
        &self,
        shape: Shape,
        input: &Self::Value,
        sums: Option<Self::Sums>,
    ) -> Result<Self::Moments>;

    /// The moments of the whole batch, from those of the groups of this rank.
    fn join_moments(groups: &BatchGroups, own: Vec<Self::Moments>) -> Result<Self::Moments>;

    /// Mean and deviation: those of the batch, which update the running ones, or the running ones.
    fn normalisation(
        norm: &Norm,
        shape: Shape,
        moments: Option<Self::Moments>,
        statistics: &mut Changes,
    ) -> Result<Self::Normalisation>;

    /// Applies a batch norm to a group.
    fn normalise(
        &self,
        call: &NormCall<Self>,
        input: Operand<Self::Value>,
        n: &Self::Normalisation,
    ) -> Result<(Self::Value, Self::Kept)>;

    /// What the backward pass of a group reads.
    fn normalised<'a>(n: &'a Self::Normalisation, kept: &'a Self::Kept) -> &'a Self::Normalised;

    /// Whether mean and deviation are the batch's, and so depend on the input.
    fn is_of_batch(normalised: &Self::Normalised) -> bool;

    /// The sums of a group. It may set the gradient to zero where the norm's ReLU does;
    /// [`norm_value_gradients`](Self::norm_value_gradients) gets the result.
    fn gradient_sums(
        &self,
        call: &NormGradientCall<Self>,
        gradient: &mut Self::Value,
    ) -> Result<Self::GradientSums>;

    /// Adds a group's gradients of the norm's weight and bias.
    fn norm_weight_gradients(
        call: &NormGradientCall<Self>,
        sums: &Self::GradientSums,
        gradients: &mut Changes,
    ) -> Result<()>;

    /// The sums of the whole batch, from those of the groups of this rank.
    ///
    /// - `batch`: whether the norm is on batch statistics. On running ones, no gradient flows through the
    ///   sums, and those of other ranks are not needed.
    fn join_gradient_sums(
        groups: &BatchGroups,
        own: Vec<Self::GradientSums>,
        batch: bool,
    ) -> Result<Self::GradientSums>;

    /// The gradients of the norm's input and residual of a group, as far as they are wanted.
    ///
    /// - `sums`: of the whole batch.
    fn norm_value_gradients(
        &self,
        call: &NormGradientCall<Self>,
        sums: &Self::GradientSums,
        gradient: Self::Value,
    ) -> Result<[Option<Self::Value>; 2]>;
}

/// A norm of all groups, for its backward pass.
pub(crate) struct NormOfGroups<B: Divisible> {
    n: B::Normalisation,
    kept: Vec<B::Kept>,
}

impl<B: Divisible> NormOfGroups<B> {
    fn of_group(&self, group: usize) -> &B::Normalised {
        B::normalised(&self.n, &self.kept[group])
    }
}

impl<B: Divisible> Grouped<B> {
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

    /// Computes every group of this rank.
    fn each_group<T: Send, R: Send>(
        &self,
        parts: Vec<T>,
        of_group: impl Fn(usize, T) -> Result<R> + Sync,
    ) -> Result<Vec<R>> {
        if parts.len() == 1 || !B::SIDE_BY_SIDE {
            let parts = parts.into_iter().enumerate();
            return parts.map(|(group, part)| of_group(group, part)).collect();
        }
        let parts = parts.into_par_iter().with_max_len(1).enumerate();
        let all: Vec<Result<R>> = parts.map(|(group, part)| of_group(group, part)).collect();
        all.into_iter().collect()
    }
}

/// The part of each group, if there is a value.
fn part<T>(value: Option<&Vec<T>>, group: usize) -> Option<&T> {
    value.map(|value| &value[group])
}

/// The parts of the groups of a value; `None` for each without one.
fn parts<T>(value: Option<Vec<T>>, groups: usize) -> Vec<Option<T>> {
    match value {
        Some(value) => value.into_iter().map(Some).collect(),
        None => (0..groups).map(|_| None).collect(),
    }
}

impl<B: Divisible> Operations for Grouped<B> {
    type Value = Vec<B::Value>;
    type Sums = Vec<B::Sums>;
    type Normalised = NormOfGroups<B>;
    type Argmax = Vec<B::Argmax>;

    const PACKS_WEIGHTS: bool = B::PACKS_WEIGHTS;

    fn norm_reads(norm: &Norm) -> [bool; 2] {
        B::norm_reads(norm)
    }

    fn recomputes(norm: &Norm) -> bool {
        B::recomputes(norm)
    }

    fn load(&self, tensor: &Tensor, shape: Shape, what: &str) -> Result<Vec<B::Value>> {
        let groups = self.groups.of_own(shape.images)?.into_iter();
        let load = |images: std::ops::Range<usize>| {
            let rows = tensor.narrow(0, images.start, images.len())?;
            self.backend.load(&rows, Shape { images: images.len(), ..shape }, what)
        };
        groups.map(load).collect()
    }

    fn unload(&self, value: &Vec<B::Value>, shape: Shape, dimensions: &[usize]) -> Result<Tensor> {
        let unload = |(group, shape): (&B::Value, Shape)| {
            let dimensions = [&[shape.images], &dimensions[1..]].concat();
            self.backend.unload(group, shape, &dimensions)
        };
        let groups = value.iter().zip(self.shapes(shape)?).map(unload);
        Tensor::cat(&groups.collect::<Result<Vec<_>>>()?, 0)
    }

    fn product(&self, call: ProductCall<Self>) -> Result<(Vec<B::Value>, Option<Vec<B::Sums>>)> {
        let geometries = self.geometries(&call.g)?;
        self.backend.prepare(PackedFor::Forward, call.product, &geometries[0], call.parameters);
        let outputs = self.each_group(geometries, |group, g| {
            self.backend.product(ProductCall {
                product: call.product,
                g,
                parameters: call.parameters,
                input: &call.input[group],
                residual: part(call.residual, group),
                sums: call.sums,
            })
        })?;
        let (outputs, sums): (Vec<_>, Vec<Option<B::Sums>>) = outputs.into_iter().unzip();
        Ok((outputs, sums.into_iter().collect()))
    }

    fn weight_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        input: &Vec<B::Value>,
        gradient: &Vec<B::Value>,
        gradients: &mut Changes,
    ) -> Result<()> {
        let groups = self.geometries(g)?.into_iter().zip(gradients.groups()).collect();
        self.each_group(groups, |group, (g, mut gradients)| {
            let (input, gradient) = (&input[group], &gradient[group]);
            self.backend.weight_gradient(product, &g, input, gradient, &mut gradients)
        })?;
        Ok(())
    }

    fn input_gradient(
        &self,
        product: &Product,
        g: &Geometry,
        parameters: &Parameters,
        gradient: &Vec<B::Value>,
        total: Option<Vec<B::Value>>,
    ) -> Result<Vec<B::Value>> {
        let geometries = self.geometries(g)?;
        self.backend.prepare(PackedFor::InputGradient, product, &geometries[0], parameters);
        let totals = parts(total, gradient.len());
        self.each_group(geometries.into_iter().zip(totals).collect(), |group, (g, total)| {
            self.backend.input_gradient(product, &g, parameters, &gradient[group], total)
        })
    }

    fn batch_norm(
        &self,
        mut call: NormCall<Self>,
        input: Operand<Vec<B::Value>>,
        statistics: &mut Changes,
    ) -> Result<(Vec<B::Value>, NormOfGroups<B>)> {
        let shapes = self.shapes(call.shape)?;
        let sums = parts(call.sums.take(), shapes.len());
        let read = input.value();
        let moments = if call.batch {
            let moments = self.each_group(sums, |group, sums| {
                self.backend.moments(shapes[group], &read[group], sums)
            });
            Some(B::join_moments(&self.groups, moments?)?)
        } else {
            None
        };
        let n = B::normalisation(call.norm, call.shape, moments, statistics)?;
        let input: Vec<Operand<B::Value>> = match input {
            Operand::Borrowed(input) => input.iter().map(Operand::Borrowed).collect(),
            Operand::Owned(input) => input.into_iter().map(Operand::Owned).collect(),
        };
        let (norm, batch, parameters, residual) =
            (call.norm, call.batch, call.parameters, call.residual);
        let normalised = self.each_group(input, |group, input| {
            let (shape, residual) = (shapes[group], part(residual, group));
            let call = NormCall { norm, shape, batch, parameters, residual, sums: None };
            self.backend.normalise(&call, input, &n)
        })?;
        let (output, kept) = normalised.into_iter().unzip();
        Ok((output, NormOfGroups { n, kept }))
    }

    fn norm_output(
        &self,
        norm: &Norm,
        shape: Shape,
        parameters: &Parameters,
        input: &Vec<B::Value>,
        normalised: &NormOfGroups<B>,
    ) -> Result<Vec<B::Value>> {
        self.each_group(self.shapes(shape)?, |group, shape| {
            let normalised = normalised.of_group(group);
            self.backend.norm_output(norm, shape, parameters, &input[group], normalised)
        })
    }

    fn batch_norm_gradients(
        &self,
        call: NormGradientCall<Self>,
        mut gradient: Vec<B::Value>,
        gradients: &mut Changes,
    ) -> Result<[Option<Vec<B::Value>>; 2]> {
        let shapes = self.shapes(call.shape)?;
        let of_group = |group: usize| NormGradientCall {
            norm: call.norm,
            shape: shapes[group],
            parameters: call.parameters,
            trained: call.trained,
            wanted: call.wanted,
            normalised: call.normalised.of_group(group),
            input: part(call.input, group),
            output: part(call.output, group),
        };
        let sums = self.each_group(gradient.iter_mut().collect(), |group, gradient| {
            self.backend.gradient_sums(&of_group(group), gradient)
        })?;
        if call.trained {
            for (group, (sums, mut gradients)) in sums.iter().zip(gradients.groups()).enumerate() {
                B::norm_weight_gradients(&of_group(group), sums, &mut gradients)?;
            }
        }
        let batch = B::is_of_batch(call.normalised.of_group(0));
        let all = B::join_gradient_sums(&self.groups, sums, batch)?;
        let mut found = [const { Vec::new() }; 2];
        let of_groups = self.each_group(gradient, |group, gradient| {
            self.backend.norm_value_gradients(&of_group(group), &all, gradient)
        })?;
        for of_group in of_groups {
            found.iter_mut().zip(of_group).for_each(|(found, part)| found.extend(part));
        }
        Ok(found.map(|found| (!found.is_empty()).then_some(found)))
    }

    fn relu(&self, shape: Shape, input: &Vec<B::Value>) -> Result<Vec<B::Value>> {
        self.each_group(self.shapes(shape)?, |group, shape| self.backend.relu(shape, &input[group]))
    }

    fn relu_gradient(
        &self,
        shape: Shape,
        output: &Vec<B::Value>,
        gradient: Vec<B::Value>,
    ) -> Result<Vec<B::Value>> {
        let groups = self.shapes(shape)?.into_iter().zip(gradient).collect();
        self.each_group(groups, |group, (shape, gradient)| {
            self.backend.relu_gradient(shape, &output[group], gradient)
        })
    }

    fn max_pool(
        &self,
        w: &Window,
        input: &Vec<B::Value>,
    ) -> Result<(Vec<B::Value>, Vec<B::Argmax>)> {
        let pooled =
            self.each_group(self.windows(w)?, |group, w| self.backend.max_pool(&w, &input[group]))?;
        Ok(pooled.into_iter().unzip())
    }

    fn max_pool_gradient(
        &self,
        w: &Window,
        argmax: &Vec<B::Argmax>,
        gradient: &Vec<B::Value>,
        total: Option<Vec<B::Value>>,
    ) -> Result<Vec<B::Value>> {
        let (windows, totals) = (self.windows(w)?, parts(total, gradient.len()));
        self.each_group(totals, |group, total| {
            let (argmax, gradient) = (&argmax[group], &gradient[group]);
            self.backend.max_pool_gradient(&windows[group], argmax, gradient, total)
        })
    }

    fn average_pool(&self, input_shape: Shape, input: &Vec<B::Value>) -> Result<Vec<B::Value>> {
        self.each_group(self.shapes(input_shape)?, |group, shape| {
            self.backend.average_pool(shape, &input[group])
        })
    }

    fn average_pool_gradient(
        &self,
        input_shape: Shape,
        gradient: &Vec<B::Value>,
        total: Option<Vec<B::Value>>,
    ) -> Result<Vec<B::Value>> {
        let (shapes, totals) = (self.shapes(input_shape)?, parts(total, gradient.len()));
        self.each_group(totals, |group, total| {
            self.backend.average_pool_gradient(shapes[group], &gradient[group], total)
        })
    }

    fn add(
        &self,
        shape: Shape,
        gradient: Vec<B::Value>,
        total: Vec<B::Value>,
    ) -> Result<Vec<B::Value>> {
        let groups = self.shapes(shape)?.into_iter().zip(gradient).zip(total).collect();
        self.each_group(groups, |_, ((shape, gradient), total)| {
            self.backend.add(shape, gradient, total)
        })
    }
}

impl Divisible for Cpu {
    type Moments = Moments;
    type Normalisation = Normalisation;
    type Kept = ();
    type GradientSums = GradientSums;

    const SIDE_BY_SIDE: bool = true;

    fn prepare(&self, to: PackedFor, product: &Product, g: &Geometry, parameters: &Parameters) {
        parameters.packed(product.weight, to, g, self);
    }

    fn moments(&self, shape: Shape, input: &Buffer, sums: Option<Buffer>) -> Result<Moments> {
        Ok(Cpu::moments(self, shape, input, sums))
    }

    fn join_moments(groups: &BatchGroups, own: Vec<Moments>) -> Result<Moments> {
        let own = tree(own, |lower, upper| lower.join(&upper)).unwrap_or_default();
        let mut numbers = numbers_of(&own);
        let join = |lower: &mut [f64], upper: &[f64]| {
            let mut joined = moments_of(lower);
            joined.join(&moments_of(upper));
            lower.copy_from_slice(&numbers_of(&joined));
        };
        communicated(groups.communicator().all_reduce(&mut numbers, join))?;
        Ok(moments_of(&numbers))
    }

    fn normalisation(
        norm: &Norm,
        shape: Shape,
        moments: Option<Moments>,
        statistics: &mut Changes,
    ) -> Result<Normalisation> {
        Ok(Cpu::normalisation(norm, shape, moments, statistics))
    }

    fn normalise(
        &self,
        call: &NormCall<Self>,
        input: Operand<Buffer>,
        n: &Normalisation,
    ) -> Result<(Buffer, ())> {
        Ok((Cpu::normalise(self, call, input, n), ()))
    }

    fn normalised<'a>(n: &'a Normalisation, (): &'a ()) -> &'a Normalisation {
        n
    }

    fn is_of_batch(n: &Normalisation) -> bool {
        n.batch
    }

    fn gradient_sums(
        &self,
        call: &NormGradientCall<Self>,
        gradient: &mut Buffer,
    ) -> Result<GradientSums> {
        Ok(Cpu::gradient_sums(self, call, gradient))
    }

    fn norm_weight_gradients(
        call: &NormGradientCall<Self>,
        sums: &GradientSums,
        gradients: &mut Changes,
    ) -> Result<()> {
        Cpu::norm_weight_gradients(call, sums, gradients);
        Ok(())
    }

    fn join_gradient_sums(
        groups: &BatchGroups,
        own: Vec<GradientSums>,
        batch: bool,
    ) -> Result<GradientSums> {
        let mut numbers = tree(own.iter().map(numbers_of_sums), |lower, upper| {
            lower.iter_mut().zip(upper).for_each(|(lower, upper)| *lower += upper);
        })
        .unwrap_or_default();
        if batch {
            communicated(groups.communicator().all_reduce_sum(&mut numbers))?;
        }
        let (plain, centred) = numbers[1..].split_at(numbers.len() / 2);
        let count = numbers[0] as usize;
        Ok(GradientSums { count, plain: plain.to_vec(), centred: centred.to_vec() })
    }

    fn norm_value_gradients(
        &self,
        call: &NormGradientCall<Self>,
        sums: &GradientSums,
        gradient: Buffer,
    ) -> Result<[Option<Buffer>; 2]> {
        Ok(Cpu::norm_value_gradients(self, call, sums, gradient))
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
