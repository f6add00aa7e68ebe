//! From the device asked for on the command line to candle's.

use anyhow::{Context, Result, bail};
use candle_core::Device;
use stage::DeviceChoice;

/// Opens the device. `auto` takes the best that the program was built for and the machine has.
///
/// # Errors
///
/// The program was built without support for it, or the machine does not have it.
pub fn device(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Auto => automatic(),
        DeviceChoice::Cuda(number) if cfg!(feature = "cuda") => Device::new_cuda(number)
            .with_context(|| {
                format!("opening --device {choice}: no such device here; use --device cpu")
            }),
        DeviceChoice::Metal if cfg!(feature = "metal") => {
            Device::new_metal(0).context("opening --device metal: none here; use --device cpu")
        }
        DeviceChoice::Cuda(_) => bail!(
            "--device {choice}: this program was built without CUDA; rebuild it with \
             `--features cuda`, or use --device cpu"
        ),
        DeviceChoice::Metal => bail!(
            "--device metal: this program was built without Metal; rebuild it with \
             `--features metal`, or use --device cpu"
        ),
    }
}

/// Opens the device of a stage that trains or runs a network of [`layers`], which compute on the
/// CPU: `auto` and `cpu` are that.
///
/// # Errors
///
/// Another device was asked for.
pub fn network_device(choice: DeviceChoice) -> Result<Device> {
    match choice {
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Device::Cpu),
        DeviceChoice::Cuda(_) | DeviceChoice::Metal => {
            bail!("--device {choice}: networks compute on the CPU alone here; use --device cpu")
        }
    }
}

fn automatic() -> Result<Device> {
    if cfg!(feature = "cuda") {
        Ok(Device::cuda_if_available(0)?)
    } else if cfg!(feature = "metal") {
        Ok(Device::metal_if_available(0)?)
    } else {
        Ok(Device::Cpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_is_always_there() -> Result<()> {
        assert!(device(DeviceChoice::Cpu)?.is_cpu());
        assert!(network_device(DeviceChoice::Auto)?.is_cpu());
        Ok(())
    }

    #[cfg(not(any(feature = "cuda", feature = "metal")))]
    #[test]
    fn a_device_that_was_not_compiled_in_is_refused_with_the_remedy() -> Result<()> {
        assert!(device(DeviceChoice::Auto)?.is_cpu());
        for (choice, flag) in [(DeviceChoice::Cuda(1), "cuda"), (DeviceChoice::Metal, "metal")] {
            let message = device(choice).expect_err("not compiled in").to_string();
            assert!(message.contains(&format!("--features {flag}")), "{message}");
            assert!(message.contains(&choice.to_string()), "{message}");
            let message = network_device(choice).expect_err("not compiled in").to_string();
            assert!(message.contains(&choice.to_string()), "{message}");
        }
        Ok(())
    }
}
