//! Builds programs of this workspace.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Builds the binary `name` of the crate `owner` with these cargo features, and returns its path.
pub fn build(owner: &str, name: &str, features: Option<&str>) -> Result<PathBuf> {
    let mut command = Command::new(program());
    command.args(["build", "--message-format", "json-render-diagnostics"]);
    command.args(["--package", owner, "--bin", name]);
    if let Some(features) = features {
        command.args(["--features", features]);
    }
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

/// The path of the cargo that started this program.
pub fn program() -> PathBuf {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into()).into()
}

/// The root of the workspace.
pub fn root() -> Result<PathBuf> {
    let manifest = env::var_os("CARGO_MANIFEST_DIR").context("start this as `cargo xtask`")?;
    let root = Path::new(&manifest).parent().context("the manifest has no folder above")?;
    Ok(root.to_owned())
}
