//! Opens candle's device for the one named on the command line.

#[cfg(any(feature = "cuda", feature = "metal"))]
use anyhow::Context;
use anyhow::{Result, bail};
use candle_core::Device;
use stage::DeviceChoice;

/// Opens the device for a stage's networks; move them there with `on`, such as
/// [`Learner::on`](crate::Learner::on).
///
/// `auto` takes a GPU if the program was built for one and the machine has it. The CPU runs the
/// kernels of this project, other devices the tensor operations of candle. Where several ranks run on a machine
/// and no number is given, rank 0 of the machine takes its first CUDA device, rank 1 the second, and so on.
///
/// # Errors
///
/// The program was built without support for it, or the machine does not have it, or has more ranks than CUDA
/// devices.
pub fn network_device(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => automatic(),
        DeviceChoice::Cuda(number) => cuda(number),
        DeviceChoice::Metal => metal(),
    }
}

#[cfg(feature = "cuda")]
fn cuda(number: Option<usize>) -> Result<Device> {
    let number = cuda_number(number, collective::Place::of_environment(), cuda_devices()?)?;
    Device::new_cuda(number).with_context(|| format!("opening --device cuda:{number}"))
}

#[cfg(not(feature = "cuda"))]
fn cuda(number: Option<usize>) -> Result<Device> {
    bail!(
        "--device {}: this program was built without CUDA; rebuild it with \
         `--features cuda`, or use --device cpu",
        DeviceChoice::Cuda(number)
    )
}

/// The number of the device for a rank at this place, of so many on the machine.
#[cfg(any(feature = "cuda", test))]
fn cuda_number(
    number: Option<usize>,
    place: Option<collective::Place>,
    found: usize,
) -> Result<usize> {
    let of_rank = place.map_or(0, |place| if place.has_own_gpus { 0 } else { place.local_rank });
    let number = match number {
        None if found > 0 && of_rank >= found => bail!(
            "rank {of_rank} of this machine, counted from 0, has no GPU: the CUDA driver shows {found}; start \
             at most {found} ranks on each machine, or use --device cpu"
        ),
        named => named.unwrap_or(of_rank),
    };
    if number >= found {
        bail!(no_cuda_device(number, found))
    }
    Ok(number)
}

#[cfg(feature = "metal")]
fn metal() -> Result<Device> {
    Device::new_metal(0).context("opening --device metal: none here; use --device cpu")
}

#[cfg(not(feature = "metal"))]
fn metal() -> Result<Device> {
    bail!(
        "--device metal: this program was built without Metal; rebuild it with \
         `--features metal`, or use --device cpu"
    )
}

fn automatic() -> Result<Device> {
    #[cfg(feature = "cuda")]
    if matches!(cuda_devices(), Ok(1..)) {
        return cuda(None);
    }
    #[cfg(feature = "metal")]
    if let Ok(device) = metal() {
        return Ok(device);
    }
    Ok(Device::Cpu)
}

/// How many CUDA devices the driver has.
#[cfg(feature = "cuda")]
fn cuda_devices() -> Result<usize> {
    use candle_core::cuda_backend::cudarc::driver::CudaContext;
    use candle_core::cuda_backend::cudarc::driver::sys::CUresult;
    match CudaContext::device_count() {
        Ok(count) => Ok(usize::try_from(count).unwrap_or(0)),
        Err(error) if error.0 == CUresult::CUDA_ERROR_NO_DEVICE => Ok(0),
        Err(error) => Err(error).context(
            "asking the CUDA driver for its devices; is one installed? Or use --device cpu",
        ),
    }
}

#[cfg(any(feature = "cuda", test))]
fn no_cuda_device(number: usize, found: usize) -> String {
    let advice = match found {
        0 => "use --device cpu".to_owned(),
        1 => "use --device cuda:0".to_owned(),
        _ => format!("use one of cuda:0 to cuda:{}", found - 1),
    };
    format!("--device cuda:{number}: no CUDA device {number}; found {found}; {advice}")
}

#[cfg(test)]
mod tests {
    use collective::Place;

    use super::*;

    #[test]
    fn the_cpu_is_always_there() -> Result<()> {
        assert!(network_device(DeviceChoice::Cpu)?.is_cpu());
        network_device(DeviceChoice::Auto).map(|_| ())
    }

    #[cfg(not(any(feature = "cuda", feature = "metal")))]
    #[test]
    fn a_device_that_was_not_compiled_in_is_refused_with_the_remedy() -> Result<()> {
        assert!(network_device(DeviceChoice::Auto)?.is_cpu());
        for (choice, flag) in [
            (DeviceChoice::Cuda(Some(1)), "cuda"),
            (DeviceChoice::Cuda(None), "cuda"),
            (DeviceChoice::Metal, "metal"),
        ] {
            let message = network_device(choice).expect_err("not compiled in").to_string();
            assert!(message.contains(&format!("--features {flag}")), "{message}");
            assert!(message.contains(&choice.to_string()), "{message}");
        }
        Ok(())
    }

    #[test]
    fn each_rank_of_a_machine_takes_its_own_gpu() -> Result<()> {
        let place = |local_rank, has_own_gpus| Some(Place { local_rank, has_own_gpus });
        assert_eq!(cuda_number(None, None, 4)?, 0);
        assert_eq!(cuda_number(None, place(3, false), 4)?, 3);
        assert_eq!(cuda_number(Some(1), place(3, false), 4)?, 1);
        assert_eq!(cuda_number(None, place(3, true), 1)?, 0);
        let few = cuda_number(None, place(2, false), 2).expect_err("two GPUs").to_string();
        assert!(few.contains("rank 2") && few.contains("at most 2 ranks"), "{few}");
        let none = cuda_number(None, place(0, false), 0).expect_err("no GPU").to_string();
        assert!(none.contains("found 0; use --device cpu"), "{none}");
        assert!(cuda_number(Some(2), None, 2).is_err());
        Ok(())
    }

    #[test]
    fn a_device_that_is_not_there_is_refused_with_those_that_are() {
        assert!(no_cuda_device(1, 1).contains("no CUDA device 1; found 1; use --device cuda:0"));
        assert!(no_cuda_device(0, 0).contains("found 0; use --device cpu"));
        assert!(no_cuda_device(7, 4).contains("cuda:0 to cuda:3"));
    }
}
