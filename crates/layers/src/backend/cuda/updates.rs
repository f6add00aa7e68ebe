//! Updates of flat numbers by the kernels of `kernels::cuda::flat`.

use std::ops::Range;

use candle_core::Result;
use kernels::cuda::flat;
use kernels::flat::{Adam, Sgd};

use super::memory::{copy, from_kernel, lend, tensor_of};
use crate::backend::tensors::DeviceVector;

/// [`kernels::flat::sgd`] on these ranges.
pub(in crate::backend) fn sgd(
    values: &mut DeviceVector,
    gradients: &DeviceVector,
    momenta: &mut DeviceVector,
    ranges: &[Range<usize>],
    with: Sgd,
) -> Result<()> {
    let (old, gradients) = (values.all()?, gradients.all()?);
    let stream = old.device().as_cuda_device()?.cuda_stream();
    let (mut new_values, mut new_momenta) = (copy(&old)?, copy(&momenta.all()?)?);
    let lent = lend(&gradients)?;
    let view = lent.view::<f32>()?;
    for range in ranges {
        from_kernel(flat::sgd(
            &stream,
            &mut new_values.slice_mut(range.clone()),
            &view.slice(range.clone()),
            &mut new_momenta.slice_mut(range.clone()),
            with,
        ))?;
    }
    values.set_all(tensor_of(new_values, old.dims(), &old)?);
    momenta.set_all(tensor_of(new_momenta, old.dims(), &old)?);
    Ok(())
}

/// [`kernels::flat::adam`] on these ranges; `step` counts from 1.
pub(in crate::backend) fn adam(
    values: &mut DeviceVector,
    gradients: &DeviceVector,
    [first, second]: [&mut DeviceVector; 2],
    ranges: &[Range<usize>],
    step: u64,
    with: Adam,
) -> Result<()> {
    let (old, gradients) = (values.all()?, gradients.all()?);
    let stream = old.device().as_cuda_device()?.cuda_stream();
    let mut new_values = copy(&old)?;
    let (mut new_first, mut new_second) = (copy(&first.all()?)?, copy(&second.all()?)?);
    let lent = lend(&gradients)?;
    let view = lent.view::<f32>()?;
    for range in ranges {
        from_kernel(flat::adam(
            &stream,
            &mut new_values.slice_mut(range.clone()),
            &view.slice(range.clone()),
            [&mut new_first.slice_mut(range.clone()), &mut new_second.slice_mut(range.clone())],
            step,
            with,
        ))?;
    }
    values.set_all(tensor_of(new_values, old.dims(), &old)?);
    first.set_all(tensor_of(new_first, old.dims(), &old)?);
    second.set_all(tensor_of(new_second, old.dims(), &old)?);
    Ok(())
}

/// [`kernels::flat::follow`].
pub(in crate::backend) fn follow(
    target: &mut DeviceVector,
    online: &DeviceVector,
    decay: f64,
) -> Result<()> {
    let (old, online) = (target.all()?, online.all()?);
    let stream = old.device().as_cuda_device()?.cuda_stream();
    let mut followed = copy(&old)?;
    let lent = lend(&online)?;
    from_kernel(flat::follow(&stream, &mut followed.as_view_mut(), &lent.view()?, decay))?;
    target.set_all(tensor_of(followed, old.dims(), &old)?);
    Ok(())
}
