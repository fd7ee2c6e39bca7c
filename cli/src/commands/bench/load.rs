//! `--scenario load`: from a checkpoint's files to ranks that could run a step, beside `cat` of the same files into
//! nothing; cold, with none of the files' pages in memory, and warm, with all of them. On a GPU also beside the rate of
//! copies to it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use conclave_kernels::backend::{Backend, KvDtype, Limits};
use conclave_worker::device::DeviceKind;
use conclave_worker::verify::{GroupConfig, LocalGroup};
use conclave_worker::weights::WeightSource;

use crate::model_path;
use crate::settings::{BenchSettings, LoadFormat};

/// Each figure is the median of so many runs, taken in turns.
const RUNS: usize = 3;
/// What loading must reach of cat's speed.
const TARGET: f64 = 0.7;

pub fn run(settings: &BenchSettings) -> Result<()> {
    if settings.model.load_format == LoadFormat::Dummy {
        bail!("load_format is dummy: there are no files to read; give a checkpoint");
    }
    let found = model_path::find(&settings.model)?;
    let files = checkpoint_files(&found.path)?;
    let lengths = files.iter().map(|file| Ok(file.metadata()?.len()));
    let bytes: u64 = lengths.sum::<Result<u64>>()?;
    let threads = super::threads(settings);
    let device = DeviceKind::choose(&settings.device.device)?;
    println!(
        "{}: {:.2} GB in {} files, {} workers x {threads} threads, {}",
        found.name,
        bytes as f64 / 1e9,
        files.len(),
        settings.workers,
        device.name()
    );
    let opened = open(device)?;
    for cold in [true, false] {
        let (mut cats, mut loads) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            prepare(&files, cold)?;
            cats.push(cat(&files)?);
            prepare(&files, cold)?;
            loads.push(load(settings, device, &found.path, threads)?);
        }
        let (cat, load) = (median(cats), median(loads));
        println!(
            "  {}: cat {:.3} s ({:.2} GB/s), load {:.3} s ({:.2} GB/s): {:.0}% of cat (target: {:.0}%)",
            if cold { "cold" } else { "warm" },
            cat,
            bytes as f64 / cat / 1e9,
            load,
            bytes as f64 / load / 1e9,
            100.0 * cat / load,
            100.0 * TARGET
        );
    }
    drop(opened);
    Ok(())
}

/// A device that stays open during the runs: what opening takes is told by itself.
fn open(device: DeviceKind) -> Result<Option<Box<dyn Backend>>> {
    if device == DeviceKind::Cpu {
        return Ok(None);
    }
    let limits = Limits {
        max_tokens: 1,
        max_logit_rows: 1,
        max_runs: 1,
        max_pages_per_run: 1,
        max_expert_rows: 1,
        page_tokens: 16,
    };
    let began = Instant::now();
    let mut backend = device.open(limits, 1)?;
    let opening = began.elapsed().as_secs_f64();
    let copies = backend.measure_copies()?;
    println!(
        "  {}: opened in {opening:.2} s, copies from pinned memory {:.1} GB/s",
        backend.describe(),
        copies.unwrap_or(f64::NAN) / 1e9
    );
    Ok(Some(backend))
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn checkpoint_files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let paths = entries.map(|entry| Ok(entry?.path()));
    let mut files = paths.collect::<Result<Vec<_>>>()?;
    files.retain(|path| {
        path.extension()
            .is_some_and(|extension| extension == "safetensors")
    });
    if files.is_empty() {
        bail!("{}: no .safetensors file is in it", directory.display());
    }
    files.sort();
    Ok(files)
}

/// Takes the files' pages out of memory, or brings all of them in.
fn prepare(files: &[PathBuf], cold: bool) -> Result<()> {
    if !cold {
        return cat(files).map(drop);
    }
    for file in files {
        // Of no blocks: only the request to forget the file is left.
        let input = format!("if={}", file.display());
        let status = Command::new("dd")
            .args([&input, "iflag=nocache", "count=0", "status=none"])
            .status()
            .context("`dd` cannot be run")?;
        if !status.success() {
            bail!("{}: `dd iflag=nocache` failed: {status}", file.display());
        }
    }
    Ok(())
}

fn cat(files: &[PathBuf]) -> Result<f64> {
    let started = Instant::now();
    let status = Command::new("cat")
        .args(files)
        .stdout(Stdio::null())
        .status()
        .context("`cat` cannot be run")?;
    if !status.success() {
        bail!("`cat` failed: {status}");
    }
    Ok(started.elapsed().as_secs_f64())
}

fn load(settings: &BenchSettings, device: DeviceKind, path: &Path, threads: usize) -> Result<f64> {
    let started = Instant::now();
    let source = Arc::new(WeightSource::open(path, settings.model.hf_overrides.as_ref())?);
    let mut group = GroupConfig::new(settings.workers);
    group.threads = threads;
    if device != DeviceKind::Cpu {
        (group.devices, group.kv_dtype) = (vec![device], KvDtype::Bf16);
    }
    let ranks = LocalGroup::start(&source, &group)?;
    let seconds = started.elapsed().as_secs_f64();
    // Pages that are still mapped would stay in memory.
    drop((ranks, source));
    Ok(seconds)
}
