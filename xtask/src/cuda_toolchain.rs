//! `cargo xtask cuda-toolchain`: sets up what building with `--features cuda,cudnn,nccl` needs, without
//! a GPU, a driver or an installed CUDA: nvcc, headers and libraries from NVIDIA's Python wheels,
//! and a stub of the driver library, which no wheel contains.
//!
//! Everything is in one folder: the downloaded `wheels`, their content under `unpacked`, and
//! `home`, which has the layout of an installed CUDA and links into `unpacked`. Existing files are
//! not downloaded again.

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// Release 13.0, because candle's kernels ship as PTX, and a driver of release 580 rejects PTX of
/// later releases.
const WHEELS: [&str; 10] = [
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-nvvm==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cuda-nvrtc==13.0.*",
    "nvidia-curand==10.4.0.35",
    "nvidia-cublas==13.0.*",
    "nvidia-cudnn-cu13<9.20",
    "nvidia-nccl-cu13<2.29",
];

/// Sets up the toolchain in `folder` and returns shell commands that make cargo use it.
///
/// `python` needs pip; `capability` is the compute capability of the card without its dot.
///
/// # Errors
///
/// Python, pip or gcc is missing; the download fails (the same command resumes it); or a wheel has
/// an unknown layout.
pub fn set_up(folder: &Path, python: &Path, capability: u32) -> Result<String> {
    let wheels = folder.join("wheels");
    let home = folder.join("home");
    download(&wheels, python)?;
    let unpacked = unpack(&wheels, &folder.join("unpacked"), python)?;
    lay_out(&unpacked, &home)?;
    let stub = home.join("lib64/stubs/libcuda.so");
    if !stub.exists() {
        build_driver_stub(&driver_functions()?, &stub)?;
    }
    let nvcc = home.join("bin/nvcc");
    run(Command::new(&nvcc).arg("--version"), "starting the nvcc that was set up")?;
    Ok(variables(&home, &nvcc, capability))
}

fn download(wheels: &Path, python: &Path) -> Result<()> {
    let complete = wheels.join("complete");
    let list = WHEELS.join("\n");
    if fs::read_to_string(&complete).is_ok_and(|have| have == list) {
        return Ok(());
    }
    fs::create_dir_all(wheels).with_context(|| format!("making `{}`", wheels.display()))?;
    tracing::info!("downloading {} wheels, about 1 GB, into {}", WHEELS.len(), wheels.display());
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "download", "--no-deps", "--dest"]).arg(wheels).args(WHEELS);
    run(&mut pip, "downloading with pip (is there a network, and does this Python have pip?)")?;
    fs::write(&complete, list).with_context(|| format!("writing `{}`", complete.display()))
}

/// Unpacks each wheel into its own folder and returns these folders. A folder gets its final name
/// when it is complete.
fn unpack(wheels: &Path, into: &Path, python: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(into).with_context(|| format!("making `{}`", into.display()))?;
    let mut folders = Vec::new();
    for wheel in entries(wheels)? {
        if wheel.extension() != Some(OsStr::new("whl")) {
            continue;
        }
        let name = wheel.file_stem().context("a wheel without a name")?;
        let folder = into.join(name);
        if !folder.exists() {
            let partial = into.join("partial");
            if partial.exists() {
                fs::remove_dir_all(&partial)?;
            }
            tracing::info!("unpacking {}", name.to_string_lossy());
            let mut zip = Command::new(python);
            zip.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&partial);
            run(&mut zip, "unpacking a wheel")?;
            fs::rename(&partial, &folder)?;
        }
        folders.push(folder);
    }
    Ok(folders)
}

/// Links the files under `nvidia/*/{bin,include,nvvm,lib}` of the wheels into the layout of an
/// installed CUDA. Adds the execute permissions, and the unversioned names that the linker looks
/// for, which wheels lack.
fn lay_out(unpacked: &[PathBuf], home: &Path) -> Result<()> {
    if home.exists() {
        fs::remove_dir_all(home).with_context(|| format!("clearing `{}`", home.display()))?;
    }
    fs::create_dir_all(home.join("lib64/stubs"))?;
    symlink("lib64", home.join("lib"))?;
    let mut found = BTreeSet::new();
    for folder in unpacked {
        let vendor = folder.join("nvidia");
        for product in entries(&vendor)? {
            for (part, to) in
                [("bin", "bin"), ("include", "include"), ("nvvm", "nvvm"), ("lib", "lib64")]
            {
                if product.join(part).is_dir() {
                    link_tree(&product.join(part), &home.join(to))?;
                    found.insert(to);
                }
            }
        }
    }
    ensure!(
        found.len() == 4,
        "the wheels have {found:?} but bin, include, lib64 and nvvm are needed; has their layout \
         changed?"
    );
    for folder in ["bin", "nvvm/bin"] {
        entries(&home.join(folder))?.iter().try_for_each(|program| make_executable(program))?;
    }
    for library in entries(&home.join("lib64"))? {
        let name = library.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if let Some((stem, _version)) = name.split_once(".so.") {
            let plain = home.join("lib64").join(format!("{stem}.so"));
            if !plain.exists() {
                symlink(&name, plain)?;
            }
        }
    }
    Ok(())
}

fn link_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in entries(from)? {
        let target = to.join(entry.file_name().context("an entry without a name")?);
        if entry.is_dir() {
            link_tree(&entry, &target)?;
        } else if !target.exists() {
            let entry = fs::canonicalize(&entry)?;
            symlink(&entry, &target).with_context(|| format!("linking `{}`", target.display()))?;
        }
    }
    Ok(())
}

fn make_executable(program: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    if program.is_dir() {
        return Ok(());
    }
    let program = fs::canonicalize(program)?;
    let mode = fs::metadata(&program)?.permissions().mode();
    Ok(fs::set_permissions(&program, fs::Permissions::from_mode(mode | 0o111))?)
}

/// The functions of the driver that cudarc, candle's binding, may call.
fn driver_functions() -> Result<BTreeSet<String>> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut metadata = Command::new(cargo);
    metadata.args(["metadata", "--format-version", "1", "--all-features"]);
    let metadata = run(&mut metadata, "asking cargo for the sources of cudarc")?;
    let metadata: Value = serde_json::from_slice(&metadata).context("cargo's metadata")?;
    let packages = metadata["packages"].as_array().context("cargo's metadata names no packages")?;
    let manifest = packages
        .iter()
        .find(|package| package["name"] == "cudarc")
        .and_then(|package| package["manifest_path"].as_str())
        .context("no crate of this workspace uses cudarc with all features on")?;
    let declarations = Path::new(manifest).with_file_name("src/driver/sys/mod.rs");
    let text = fs::read_to_string(&declarations)
        .with_context(|| format!("reading `{}`", declarations.display()))?;
    let functions = declared_functions(&text);
    ensure!(!functions.is_empty(), "`{}` declares no function", declarations.display());
    Ok(functions)
}

/// The names of driver functions that the text declares: `cu` and a capital letter.
fn declared_functions(text: &str) -> BTreeSet<String> {
    text.split("fn cu")
        .skip(1)
        .filter(|rest| rest.starts_with(|first: char| first.is_ascii_uppercase()))
        .map(|rest| {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            format!("cu{}", &rest[..end])
        })
        .collect()
}

/// Builds a library with these functions, each of which returns `CUDA_ERROR_STUB_LIBRARY`. It is
/// enough to link a program, which then reports that there is no driver.
fn build_driver_stub(functions: &BTreeSet<String>, stub: &Path) -> Result<()> {
    let source = stub.with_extension("c");
    let code: String =
        functions.iter().map(|name| format!("int {name}(void) {{ return 34; }}\n")).collect();
    fs::write(&source, code)?;
    let mut gcc = Command::new("gcc");
    gcc.args(["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"]).arg(stub).arg(&source);
    run(&mut gcc, "building the stub of the driver library with gcc")?;
    let versioned = stub.with_extension("so.1");
    if !versioned.exists() {
        symlink("libcuda.so", versioned)?;
    }
    Ok(())
}

/// The shell commands. `LIBRARY_PATH` is for linking; running needs the real driver library. nvcc
/// compresses machine code as much as it can, because candle's is most of the program otherwise.
fn variables(home: &Path, nvcc: &Path, capability: u32) -> String {
    let home = home.display();
    format!(
        "export CUDA_HOME='{home}'\n\
         export CUDA_PATH='{home}'\n\
         export NVCC='{nvcc}'\n\
         export PATH='{home}/bin':\"$PATH\"\n\
         export NVCC_APPEND_FLAGS='--compress-mode=size'\n\
         export CUDA_COMPUTE_CAP={capability}\n\
         export LIBRARY_PATH='{home}/lib64:{home}/lib64/stubs'\n",
        nvcc = nvcc.display()
    )
}

/// The entries of a folder, sorted by name.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
    };
    let mut paths = read().with_context(|| format!("reading `{}`", folder.display()))?;
    paths.sort();
    Ok(paths)
}

/// Runs a program to its end and returns its stdout; its stderr goes to ours.
fn run(command: &mut Command, doing: &str) -> Result<Vec<u8>> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("{doing}: `{program}` does not start"))?;
    if !output.status.success() {
        bail!("{doing}: `{program}` failed, {}; its messages are above", output.status)
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_declared_functions_of_the_driver_are_found() {
        let text = "unsafe extern \"C\" { pub fn cuInit(flags: u32) -> CUresult;\n\
                    pub fn cuMemAlloc_v2(p: *mut u64, n: usize); fn current(); fn cudaMalloc(); }";
        let found: Vec<String> = declared_functions(text).into_iter().collect();
        assert_eq!(found, ["cuInit", "cuMemAlloc_v2"]);
    }

    #[test]
    fn wheels_become_the_layout_of_an_installed_cuda() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let wheel = |name: &str, files: &[&str]| -> Result<PathBuf> {
            let root = folder.path().join(name);
            for file in files {
                let path = root.join("nvidia").join(file);
                fs::create_dir_all(path.parent().context("a folder")?)?;
                fs::write(path, name)?;
            }
            Ok(root)
        };
        let nvcc = wheel("nvcc", &["cu13/bin/nvcc", "cu13/nvvm/bin/cicc", "cu13/include/a.h"])?;
        let cudnn = wheel("cudnn", &["cudnn/lib/libcudnn.so.9", "cudnn/include/cudnn.h"])?;
        let home = folder.path().join("home");
        for _ in 0..2 {
            lay_out(&[nvcc.clone(), cudnn.clone()], &home)?;
            for file in ["bin/nvcc", "nvvm/bin/cicc", "include/a.h", "include/cudnn.h"] {
                assert!(home.join(file).is_file(), "{file}");
            }
            assert_eq!(fs::read_to_string(home.join("lib/libcudnn.so"))?, "cudnn");
        }
        use std::os::unix::fs::PermissionsExt;
        assert_ne!(fs::metadata(home.join("bin/nvcc"))?.permissions().mode() & 0o100, 0);
        let message = lay_out(&[cudnn], &home).expect_err("no nvcc").to_string();
        assert!(message.contains("bin, include, lib64 and nvvm"), "{message}");
        Ok(())
    }
}
