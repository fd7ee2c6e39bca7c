//! With the feature `cuda`: compiles every `.cu` file to an sm_90a fatbin and lists them in `$OUT_DIR/fatbins.rs`.
//! Needs nvcc 12.8 or newer (in `CUDA_HOME`, on `PATH`, or from the PyPI wheels of some Python's site-packages) and
//! no GPU. Without the feature it does nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::SystemTime;
use std::{env, fs, thread};

const ARCHITECTURE: &str = "-gencode=arch=compute_90a,code=sm_90a";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for variable in ["CUDA_HOME", "CUDA_PATH", "PATH", "VIRTUAL_ENV"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(env::var("OUT_DIR").unwrap_or_default());
    let mut sources = Vec::new();
    find(&root.join("src"), &mut sources);
    sources.sort();
    let nvcc = match nvcc() {
        Some(nvcc) => nvcc,
        None => fail(
            "the feature `cuda` needs nvcc 12.8 or newer: set CUDA_HOME, put nvcc on PATH, or \
             `pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-crt nvidia-nvvm` \
             into an active virtual environment",
        ),
    };
    let script = root.join("build.rs");
    let jobs = env::var("NUM_JOBS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    let queue = Mutex::new(sources.iter());
    let errors = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(source) = next(&queue) {
                    let mut read = vec![script.clone()];
                    includes(source, &mut read);
                    if let Err(error) = compile(&nvcc, source, newest(&read), &out) {
                        push(&errors, error);
                    }
                }
            });
        }
    });
    let errors = errors.into_inner().unwrap_or_default();
    if !errors.is_empty() {
        fail(&errors.join("\n"));
    }
    let list: String = sources
        .iter()
        .map(|source| {
            let name = stem(source);
            format!("(\"{name}\", include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))),\n")
        })
        .collect();
    if let Err(error) = fs::write(out.join("fatbins.rs"), format!("&[\n{list}]\n")) {
        fail(&format!("cannot write {}: {error}", out.display()));
    }
}

fn next<'a>(queue: &Mutex<std::slice::Iter<'a, PathBuf>>) -> Option<&'a PathBuf> {
    queue.lock().ok()?.next()
}

fn push(errors: &Mutex<Vec<String>>, error: String) {
    if let Ok(mut errors) = errors.lock() {
        errors.push(error);
    }
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    std::process::exit(1);
}

/// The latest change of any of the files.
fn newest(files: &[PathBuf]) -> Option<SystemTime> {
    files
        .iter()
        .filter_map(|file| fs::metadata(file).ok()?.modified().ok())
        .max()
}

/// The files that `source` includes by `#include "..."`, and those that they include.
fn includes(source: &Path, found: &mut Vec<PathBuf>) {
    let text = fs::read_to_string(source).unwrap_or_default();
    let names = text
        .lines()
        .filter_map(|line| line.strip_prefix("#include \"")?.strip_suffix('"'));
    for name in names {
        let Ok(path) = source.with_file_name(name).canonicalize() else {
            continue;
        };
        if !found.contains(&path) {
            found.push(path.clone());
            includes(&path, found);
        }
    }
}

/// All `.cu` files under `folder`.
fn find(folder: &Path, sources: &mut Vec<PathBuf>) {
    println!("cargo::rerun-if-changed={}", folder.display());
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        match path.extension().and_then(|e| e.to_str()) {
            _ if path.is_dir() => find(&path, sources),
            Some("cu") => sources.push(path),
            _ => {}
        }
    }
}

/// `ops/attention/decode.cu` -> `attention_decode`.
fn stem(source: &Path) -> String {
    let part = |path: &Path| {
        path.file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    format!(
        "{}_{}",
        source.parent().map(part).unwrap_or_default(),
        part(source)
    )
}

/// Compiles one file, unless its fatbin is newer than it and all headers.
fn compile(nvcc: &Nvcc, source: &PathBuf, headers: Option<SystemTime>, out: &Path) -> Result<(), String> {
    let fatbin = out.join(format!("{}.fatbin", stem(source)));
    let inputs = newest(std::slice::from_ref(source)).max(headers);
    if newest(std::slice::from_ref(&fatbin)) > inputs {
        return Ok(());
    }
    let output = Command::new(&nvcc.program)
        .args(["-std=c++17", "-O3", "-fatbin", ARCHITECTURE])
        .args(
            nvcc.include
                .iter()
                .map(|folder| format!("-I{}", folder.display())),
        )
        .arg("-o")
        .arg(&fatbin)
        .arg(source)
        .output()
        .map_err(|error| format!("cannot run {}: {error}", nvcc.program.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "{} does not compile:\n{}{}",
        source.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}

struct Nvcc {
    program: PathBuf,
    include: Option<PathBuf>,
}

fn nvcc() -> Option<Nvcc> {
    let homes = ["CUDA_HOME", "CUDA_PATH"]
        .into_iter()
        .filter_map(env::var_os)
        .map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    let from_path = env::split_paths(&path).map(|folder| folder.join("nvcc"));
    let wheels = site_packages(&path).into_iter().flat_map(|site| {
        let nvidia = site.join("nvidia");
        let folders = fs::read_dir(&nvidia).into_iter().flatten().flatten();
        folders
            .map(|entry| entry.path().join("bin/nvcc"))
            .collect::<Vec<_>>()
    });
    let program = homes
        .map(|home| home.join("bin/nvcc"))
        .chain(from_path)
        .chain(wheels)
        .find(|program| program.is_file())?;
    let include = program.parent()?.parent()?.join("include");
    Some(Nvcc {
        include: include.is_dir().then_some(include),
        program,
    })
}

/// Where the Pythons of the active environment and of `PATH` keep their packages.
fn site_packages(path: &std::ffi::OsStr) -> Vec<PathBuf> {
    let active = env::var_os("VIRTUAL_ENV").map(PathBuf::from);
    let prefixes = active
        .into_iter()
        .chain(env::split_paths(path).filter_map(|folder| Some(folder.parent()?.to_path_buf())));
    prefixes
        .flat_map(|prefix| fs::read_dir(prefix.join("lib")).into_iter().flatten().flatten())
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("python3"))
        .map(|entry| entry.path().join("site-packages"))
        .collect()
}
