//! Exit statuses: one set for stages and for the programs that start them.

use std::env;
use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::process::ExitCode;

use anyhow::{Error, Result};

use crate::console;

/// The exit status of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// The work is done.
    Done = 0,
    /// The arguments, the experiment or an input file are invalid; the user can correct them.
    BadInput = 2,
    /// Stopped on request; the same command resumes.
    Interrupted = 3,
    /// Training produced a number that is not finite, or collapsed to one cluster.
    Diverged = 4,
    /// The machine failed: full disk, I/O error, out of memory, device driver. The same command
    /// may succeed once the machine is well.
    MachineFailed = 5,
}

impl Status {
    /// The number that the process ends with.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// The status that a process which ended with `code` reports, or `None` for a foreign code.
    pub fn from_code(code: i32) -> Option<Self> {
        [Self::Done, Self::BadInput, Self::Interrupted, Self::Diverged, Self::MachineFailed]
            .into_iter()
            .find(|status| i32::from(status.code()) == code)
    }

    /// The status for an error, found through any context that was added to it.
    pub fn of_error(error: &Error) -> Self {
        if error.is::<Interrupted>() {
            Self::Interrupted
        } else if error.is::<Diverged>() {
            Self::Diverged
        } else if error.is::<MachineFailed>() || machine_failed(&format!("{error:#}")) {
            Self::MachineFailed
        } else {
            Self::BadInput
        }
    }
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        status.code().into()
    }
}

/// The environment variable that names a file for the error of a program. A caller that reports errors in its own
/// words sets it: the error is appended to the file and not printed.
pub const ERROR_FILE: &str = "ASSORT_ERROR_FILE";

/// Ends a program's `main`: prints the error, if there is one, or appends it to the file of [`ERROR_FILE`]. Returns the
/// exit status.
pub fn finish(program: &str, result: &Result<()>) -> ExitCode {
    let Err(error) = result else { return Status::Done.into() };
    let message = format!("{program}: {error:#}");
    let is_kept = env::var_os(ERROR_FILE).is_some_and(|file| append(&file, &message).is_ok());
    if !is_kept {
        console::print_error(message);
    }
    Status::of_error(error).into()
}

fn append(file: &OsStr, message: &str) -> io::Result<()> {
    writeln!(File::options().create(true).append(true).open(file)?, "{message}")
}

/// The error of a stage that stopped on request; it can be resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interrupted;

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted; the same command resumes from here")
    }
}

impl std::error::Error for Interrupted {}

/// The error of a stage whose training diverged or collapsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Diverged(pub String);

impl fmt::Display for Diverged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Diverged {}

/// The error of a machine failure that is known from the exit status of a child process alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineFailed(pub String);

impl fmt::Display for MachineFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for MachineFailed {}

/// True if the text of an error contains one of the operating system or of a device driver.
///
/// The text is searched because libraries wrap the system's errors in opaque types, and because this
/// crate links no library of a device.
fn machine_failed(text: &str) -> bool {
    let of_driver = DRIVERS.iter().any(|words| text.contains(words));
    let of_bad_argument = NO_SUCH_DEVICE.iter().any(|words| text.contains(words));
    let mut numbers = text
        .split("(os error ")
        .skip(1)
        .filter_map(|rest| rest.split_once(')').and_then(|(number, _)| number.parse::<i32>().ok()));
    of_driver && !of_bad_argument || numbers.any(is_of_machine) || text.contains(OUT_OF_MEMORY)
}

/// Prefixes of errors of CUDA's libraries and of Metal.
const DRIVERS: [&str; 6] = [
    "CUDA_ERROR_",
    "CUDNN_STATUS_",
    "CUBLAS_STATUS_",
    "CURAND_STATUS_",
    "NVRTC_ERROR_",
    "Failed to create metal resource",
];

/// Errors of a driver for an invalid `--device`.
const NO_SUCH_DEVICE: [&str; 2] = ["CUDA_ERROR_INVALID_DEVICE", "CUDA_ERROR_NO_DEVICE"];

/// The text of [`ErrorKind::OutOfMemory`] and of failed reservations.
const OUT_OF_MEMORY: &str = "out of memory";

/// True for an error number of the operating system that means a machine failure.
fn is_of_machine(number: i32) -> bool {
    let kind = io::Error::from_raw_os_error(number).kind();
    let by_kind = matches!(
        kind,
        ErrorKind::StorageFull
            | ErrorKind::QuotaExceeded
            | ErrorKind::FileTooLarge
            | ErrorKind::OutOfMemory
            | ErrorKind::StaleNetworkFileHandle
            | ErrorKind::WouldBlock
    );
    // EIO, ENFILE, EMFILE, which have no `ErrorKind`.
    by_kind || cfg!(unix) && matches!(number, 5 | 23 | 24)
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::*;

    #[test]
    fn a_status_is_found_through_added_context() {
        let status = |error: Error| Status::of_error(&error.context("epoch 3"));
        assert_eq!(status(anyhow!("no such file")), Status::BadInput);
        assert_eq!(status(Interrupted.into()), Status::Interrupted);
        assert_eq!(status(Diverged("loss is NaN".into()).into()), Status::Diverged);
        assert_eq!(status(MachineFailed("0-embed failed".into()).into()), Status::MachineFailed);
        assert_eq!(finish("example", &Ok(())), ExitCode::SUCCESS);
        assert_eq!(finish("example", &Err(Interrupted.into())), ExitCode::from(3));
    }

    #[cfg(unix)]
    #[test]
    fn errors_of_the_system_tell_a_failed_machine_from_bad_input() {
        let status = |number| {
            let failed: io::Result<()> = Err(io::Error::from_raw_os_error(number));
            Status::of_error(&failed.context("writing `x`").expect_err("failed"))
        };
        // ENOSPC, EDQUOT, EFBIG, EIO, EMFILE, ENFILE, ENOMEM, EAGAIN, ESTALE.
        for number in [28, 122, 27, 5, 24, 23, 12, 11, 116] {
            assert_eq!(status(number), Status::MachineFailed, "{number}");
        }
        // ENOENT, EACCES, EISDIR, EROFS.
        for number in [2, 13, 21, 30] {
            assert_eq!(status(number), Status::BadInput, "{number}");
        }
        // As `tempfile` does: the number is only in the text of an inner error.
        let inner = format!("{} at path \"/x\"", io::Error::from_raw_os_error(24));
        let wrapped = Error::from(io::Error::other(inner)).context("writing `x`");
        assert_eq!(Status::of_error(&wrapped), Status::MachineFailed);
    }

    #[test]
    fn errors_of_a_driver_are_the_machine_s_but_not_a_device_that_is_not_there() {
        let status = |text: &str| Status::of_error(&anyhow!("{text}").context("a step"));
        for text in [
            "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"an illegal memory access\")",
            "DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")",
            "CUDNN_STATUS_EXECUTION_FAILED",
            "Failed to create metal resource: Buffer",
        ] {
            assert_eq!(status(text), Status::MachineFailed, "{text}");
        }
        let absent = "DriverError(CUDA_ERROR_INVALID_DEVICE, \"invalid device ordinal\")";
        assert_eq!(status(absent), Status::BadInput);
    }

    #[test]
    fn codes_are_read_as_they_are_written() {
        for code in [0, 2, 3, 4, 5] {
            assert_eq!(Status::from_code(code).map(Status::code).map(i32::from), Some(code));
        }
        assert_eq!(Status::from_code(1), None);
        assert_eq!(Status::from_code(101), None);
    }
}
