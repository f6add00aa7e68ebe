//! What the program can compute on, and whether a device agrees with the CPU.

use anyhow::Result;
use collective::Communicator;
use stage::console::{print_error, print_line};
use stage::{DeviceChoice, Status};
use training::{agreement, network_device};
use xtask::Devices;

/// The devices of this build.
pub const DEVICES: Devices = Devices { resolve, check, features: FEATURES, describe };

const FEATURES: &[&str] =
    match (cfg!(feature = "cuda"), cfg!(feature = "cudnn"), cfg!(feature = "metal")) {
        (_, true, true) => &["cuda", "cudnn", "metal"],
        (_, true, false) => &["cuda", "cudnn"],
        (true, false, true) => &["cuda", "metal"],
        (true, false, false) => &["cuda"],
        (false, false, true) => &["metal"],
        (false, false, false) => &[],
    };

/// The device that `choice` stands for on this machine.
fn resolve(choice: DeviceChoice) -> Result<DeviceChoice> {
    let device = network_device(choice)?;
    Ok(match choice {
        DeviceChoice::Auto if device.is_cuda() => DeviceChoice::Cuda(None),
        DeviceChoice::Auto if device.is_metal() => DeviceChoice::Metal,
        DeviceChoice::Auto => DeviceChoice::Cpu,
        named => named,
    })
}

/// Compares one training step of small networks on a device with the same by the CPU's kernels. One of several
/// ranks compares what they share with what it computes alone.
fn check(choice: DeviceChoice) -> Result<bool> {
    let communicator = Communicator::of_environment()?;
    if communicator.size() > 1 {
        return Ok(check_on_rank(choice, &communicator).unwrap_or_else(|error| {
            let (rank, ranks) = (communicator.rank(), communicator.size());
            print_error(format_args!("gpu-check, rank {rank} of {ranks}: {error:#}"));
            // The others would wait for this one.
            communicator.abort(Status::of_error(&error).code())
        }));
    }
    let device = network_device(choice)?;
    print_line(format_args!("{:?} beside the CPU's kernels", device.location()))?;
    let found = agreement::compare(&device)?;
    found.iter().try_for_each(print_line)?;
    let wrong = found.iter().filter(|agreement| !agreement.holds()).count();
    print_line(format_args!("{} results, {wrong} beyond their bound", found.len()))?;
    Ok(wrong == 0)
}

/// The first rank prints the results; they hold if they do on all ranks.
fn check_on_rank(choice: DeviceChoice, communicator: &Communicator) -> Result<bool> {
    let device = network_device(choice)?;
    let found = agreement::compare_ranks(&device, communicator)?;
    let wrong = found.iter().filter(|agreement| !agreement.holds()).count();
    if communicator.is_first() {
        let way = if cfg!(feature = "nccl") && device.is_cuda() { "NCCL" } else { "host memory" };
        let (ranks, place) = (communicator.size(), device.location());
        print_line(format_args!("{ranks} ranks, the first on {place:?}, connected through {way}"))?;
        found.iter().try_for_each(print_line)?;
        print_line(format_args!("{} results, {wrong} beyond their bound", found.len()))?;
    } else if wrong > 0 {
        print_line(format_args!("rank {}: {wrong} beyond their bound", communicator.rank()))?;
    }
    Ok(!communicator.any(wrong > 0)?)
}

/// What this build computes on, and for CUDA the files of its libraries.
fn describe() -> String {
    let devices = match (cfg!(feature = "cuda"), cfg!(feature = "metal")) {
        (true, true) => "the CPU, CUDA and Metal",
        (true, false) => "the CPU and CUDA",
        (false, true) => "the CPU and Metal",
        (false, false) => {
            "the CPU alone (rebuild it with --features cuda,cudnn or metal for a GPU)"
        }
    };
    let mut text = format!("computes on {devices}");
    if cfg!(feature = "cuda") {
        text.push_str("\nCUDA's libraries, searched in LD_LIBRARY_PATH and the system's list:");
        libraries().iter().for_each(|library| text.push_str(&format!("\n  {library}")));
    }
    text
}

/// The libraries of CUDA that this program needs, and the files that the system's loader found for
/// them. The program does not start without them.
fn libraries() -> Vec<String> {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let files: Vec<&str> = maps.lines().filter_map(|line| line.split_whitespace().nth(5)).collect();
    let found = |(name, what): &(&str, &str)| {
        let (stem, _) = name.split_once(".so").unwrap_or((name, ""));
        let file = files.iter().find(|file| file.contains(&format!("/{stem}.so")));
        format!("{name} ({what}): {}", file.unwrap_or(&"not needed by this build"))
    };
    LIBRARIES.iter().map(found).collect()
}

/// What a program with CUDA needs at run time.
const LIBRARIES: [(&str, &str); 6] = [
    ("libcuda.so.1", "the driver, of release 580 or later"),
    ("libcudart.so.13", "CUDA 13"),
    ("libcublas.so.13", "CUDA 13"),
    ("libcurand.so.10", "CUDA 13"),
    ("libcudnn.so.9", "cuDNN 9, where built with the feature cudnn"),
    ("libnccl.so.2", "NCCL 2, where built with the feature nccl"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_is_resolved_and_a_device_that_this_build_lacks_is_refused() -> Result<()> {
        assert_ne!(resolve(DeviceChoice::Auto)?, DeviceChoice::Auto);
        assert_eq!(resolve(DeviceChoice::Cpu)?, DeviceChoice::Cpu);
        if FEATURES.is_empty() {
            for device in [DeviceChoice::Cuda(None), DeviceChoice::Metal] {
                let message = resolve(device).expect_err("not compiled in").to_string();
                assert!(message.contains("--device"), "{message}");
            }
        }
        Ok(())
    }
}
