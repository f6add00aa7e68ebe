//! Compiles the CUDA kernels, `cuda/*.cu`, to PTX if the feature `cuda` is on.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Source, output and definitions of each compilation.
const KERNELS: [(&str, &str, &[&str]); 3] = [
    ("flat.cu", "flat.ptx", &[]),
    ("norm.cu", "norm-f32.ptx", &[]),
    ("norm.cu", "norm-bf16.ptx", &["-DBF16"]),
];

/// The oldest architecture of nvcc 13. The driver compiles this PTX for its card.
const ARCHITECTURE: &str = "compute_75";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-env-changed=NVCC");
    println!("cargo::rerun-if-env-changed=CUDA_HOME");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let (nvcc, out) = (nvcc(), PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")));
    for (source, ptx, defined) in KERNELS {
        compile(&nvcc, &Path::new("cuda").join(source), &out.join(ptx), defined);
    }
}

fn nvcc() -> PathBuf {
    let of_home = || env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/nvcc"));
    let named = env::var_os("NVCC").map(PathBuf::from).or_else(of_home);
    named.unwrap_or_else(|| PathBuf::from("nvcc"))
}

fn compile(nvcc: &Path, source: &Path, ptx: &Path, defined: &[&str]) {
    let mut command = Command::new(nvcc);
    command.arg("-ptx").arg(format!("-arch={ARCHITECTURE}")).args(defined);
    let run = command.arg(source).arg("-o").arg(ptx).output();
    let failure = match &run {
        Ok(output) if output.status.success() => return,
        Ok(output) => String::from_utf8_lossy(&output.stderr).into_owned(),
        Err(error) => error.to_string(),
    };
    panic!(
        "compiling {} with `{}` failed: {failure}\nthe feature `cuda` needs nvcc of CUDA 13 in NVCC, in \
         CUDA_HOME/bin or in PATH; `eval \"$(cargo xtask cuda-toolchain)\"` installs one",
        source.display(),
        nvcc.display()
    );
}
