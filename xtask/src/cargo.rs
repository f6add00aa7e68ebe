//! Builds programs of this workspace, for `cargo xtask` and the tests.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Builds the binary `name` of the crate `owner` with these cargo features, and returns its path.
///
/// # Errors
///
/// The build fails.
pub fn build(owner: &str, name: &str, features: Option<&str>) -> Result<PathBuf> {
    let mut command = command();
    command.args(["build", "--message-format", "json-render-diagnostics"]);
    command.args(["--package", owner, "--bin", name]);
    if let Some(features) = features {
        command.args(["--features", features]);
    }
    executable(command, name)
}

/// Builds the binary `name` of a package outside of the workspace, optimised, into the folder `target`, and returns its
/// path.
///
/// # Errors
///
/// The build fails.
pub fn build_outside(manifest: &Path, name: &str, target: &Path) -> Result<PathBuf> {
    let mut command = command();
    command.args(["build", "--release", "--message-format", "json-render-diagnostics"]);
    command.arg("--manifest-path").arg(manifest).arg("--target-dir").arg(target);
    executable(command, name)
}

/// Runs a build, and returns the path of the binary `name`.
fn executable(mut command: Command, name: &str) -> Result<PathBuf> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.context("starting cargo")?;
    ensure!(output.status.success(), "building `{name}` failed; cargo's messages are above");
    let executables = String::from_utf8_lossy(&output.stdout).into_owned();
    executables
        .lines()
        // Other lines are what build scripts print.
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| {
            let is_it = message.pointer("/target/name")?.as_str()? == name;
            Some(PathBuf::from(message.get("executable").filter(|_| is_it)?.as_str()?))
        })
        .with_context(|| format!("cargo built no `{name}`"))
}

/// A command for the cargo that started this program.
///
/// It does not inherit the variables that cargo sets for a package at work. Build scripts that read
/// them, such as ring's, would run again whenever a build from here follows one from a shell, and
/// every crate above them would be compiled again.
pub fn command() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// The root of the workspace.
///
/// # Errors
///
/// Cargo did not start this program.
pub fn root() -> Result<PathBuf> {
    let manifest = env::var_os("CARGO_MANIFEST_DIR").context("start this as `cargo xtask`")?;
    let root = Path::new(&manifest).parent().context("the manifest has no folder above")?;
    Ok(root.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cargo_does_not_inherit_the_package_of_its_caller() {
        let command = command();
        let removed: Vec<_> = command.get_envs().filter(|(_, value)| value.is_none()).collect();
        for name in ["CARGO_MANIFEST_DIR", "CARGO_PKG_NAME"] {
            assert!(env::var_os(name).is_some(), "cargo sets {name} for a test");
            assert!(removed.iter().any(|(removed, _)| *removed == name), "{name}");
        }
    }
}
