//! `--scenario load`: from a checkpoint's files to ranks that could run a step, beside `cat` of the same files into
//! nothing; cold, with none of the files' pages in memory, and warm, with all of them. On a GPU also beside the rate of
//! copies to it. The first steps after it are timed too: what loading put off would show there.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use conclave_kernels::backend::{Backend, KvDtype, Limits};
use conclave_proto::cluster::v1 as wire;
use conclave_worker::device::DeviceKind;
use conclave_worker::verify::{GroupConfig, LocalGroup, greedy, run as run_of, start as start_of};
use conclave_worker::weights::WeightSource;

use crate::model_path;
use crate::settings::{BenchSettings, LoadFormat};

/// Each figure is the median of so many runs, taken in turns.
const RUNS: usize = 3;
/// What loading must reach of cat's speed.
const TARGET: f64 = 0.7;
/// Steps of one token each after a load: the first, and those it is held to.
const STEPS: usize = 10;

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
        let (mut firsts, mut laters) = (Vec::new(), Vec::new());
        for _ in 0..RUNS {
            prepare(&files, cold)?;
            cats.push(cat(&files)?);
            prepare(&files, cold)?;
            let loaded = load(settings, device, &found.path, threads)?;
            loads.push(loaded.seconds);
            firsts.push(loaded.first_step);
            laters.push(loaded.later_step);
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
        println!(
            "        then one token takes {:.1} ms in the first step, {:.1} ms in the next {}",
            1e3 * median(firsts),
            1e3 * median(laters),
            STEPS - 1
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

struct Loaded {
    seconds: f64,
    first_step: f64,
    /// The median of the others.
    later_step: f64,
}

fn load(settings: &BenchSettings, device: DeviceKind, path: &Path, threads: usize) -> Result<Loaded> {
    let started = Instant::now();
    let source = Arc::new(WeightSource::open(path, settings.model.hf_overrides.as_ref())?);
    let mut group = GroupConfig::new(settings.workers);
    group.threads = threads;
    if device != DeviceKind::Cpu {
        (group.devices, group.kv_dtype) = (vec![device], KvDtype::Bf16);
    }
    let mut ranks = LocalGroup::start(&source, &group)?;
    let seconds = started.elapsed().as_secs_f64();
    let mut steps = steps(&mut ranks)?;
    // Pages that are still mapped would stay in memory.
    drop((ranks, source));
    let first_step = steps.remove(0);
    let later_step = median(steps);
    Ok(Loaded {
        seconds,
        first_step,
        later_step,
    })
}

/// Seconds of each of [`STEPS`] steps: a prompt of one token on rank 0, and what follows it.
fn steps(ranks: &mut LocalGroup) -> Result<Vec<f64>> {
    let mut seconds = Vec::with_capacity(STEPS);
    for position in 0..STEPS {
        let mut steps = vec![wire::Step::default(); ranks.ranks()];
        let prompt: &[u32] = if position == 0 { &[1] } else { &[] };
        if position == 0 {
            steps[0].start_slots.push(start_of(0, vec![0], 1, greedy()));
        }
        steps[0].runs.push(run_of(0, position, prompt, true));
        let started = Instant::now();
        ranks.step(steps, false)?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    Ok(seconds)
}
