//! `--scenario decode|prefill`: a model's steps through the workers' executor and exchange, without a router.
//!
//! Steps are sent ahead as a router sends them. Beside each figure stands the floor: the step's bytes over the measured
//! read bandwidth, or its operations over the measured peak, whichever takes longer. With several GPUs the bytes are those
//! of the busiest rank and the ceilings those of one GPU; several ranks of CPUs share one memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use conclave_kernels::backend::Ceilings;
use conclave_kernels::bench::Floors;
use conclave_kernels::cpu::Isa;
use conclave_plan::roofline;
use conclave_plan::storage::StorageFormat;
use conclave_worker::device::DeviceKind;
use conclave_worker::model::Modes;
use conclave_worker::transport::TransportKind;
use conclave_worker::verify::{GroupConfig, LocalGroup};
use conclave_worker::weights::WeightSource;
use serde_json::{Value, json};

mod load;

use super::results;
use super::serve::{Report, Timing};
use crate::settings::{BenchSettings, KvCacheDtype, LoadFormat, Transport};
use crate::{model_path, parts};
use load::Load;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Decode,
    Prefill,
}

pub fn run(settings: &BenchSettings, phase: Phase) -> Result<()> {
    let figures = measure(settings, phase)?;
    let name = if phase == Phase::Decode {
        "decode"
    } else {
        "prefill"
    };
    results::write(settings.result_filename.as_deref(), name, &Value::Array(figures))
}

/// A figure for each batch, printed as it comes.
pub fn measure(settings: &BenchSettings, phase: Phase) -> Result<Vec<Value>> {
    let found = model_path::find(&settings.model)?;
    let devices = DeviceKind::choose_all(&settings.device.device)?;
    let on_gpus = devices[0] != DeviceKind::Cpu;
    let threads = super::threads(settings);
    let overrides = settings.model.hf_overrides.as_ref();
    let all_threads = threads * settings.workers as usize;
    let source = match settings.model.load_format {
        LoadFormat::Safetensors => WeightSource::open(&found.path, overrides)?,
        LoadFormat::Dummy => {
            WeightSource::dummy(&found.path, overrides, settings.model.dummy_seed, all_threads)?
        }
    };
    let bench = Bench {
        settings,
        phase,
        source: Arc::new(source),
        devices,
        threads,
    };
    let mut figures = Vec::new();
    match on_gpus {
        false => {
            let floors = Floors::measure(all_threads, Isa::detect())?;
            let ceilings = Ceilings {
                read: floors.read,
                flops: floors.flops,
            };
            let on = format!(
                "{} workers x {threads} threads, {}",
                settings.workers,
                Isa::detect().name()
            );
            print_ceilings(&found.name, &on, &ceilings);
            for &batch in &settings.batch {
                let mut load = bench.load(&[batch])?;
                figures.push(bench.figure(&mut load, batch, &ceilings)?);
            }
        }
        true => {
            // The model is loaded once.
            let began = Instant::now();
            let mut load = bench.load(&settings.batch)?;
            let seconds = began.elapsed().as_secs_f64();
            let (on, ceilings) = load.device_facts()?;
            let on = match settings.workers {
                1 => on,
                workers => format!(
                    "{workers} workers over {}, the first on {on}",
                    bench.transport().name()
                ),
            };
            print_ceilings(&found.name, &on, &ceilings);
            println!("  loaded after {seconds:.1} s");
            for &batch in &settings.batch {
                figures.push(bench.figure(&mut load, batch, &ceilings)?);
            }
        }
    }
    Ok(figures)
}

fn print_ceilings(model: &str, on: &str, ceilings: &Ceilings) {
    println!(
        "{model} on {on}: reads {:.1} GB/s, multiply-adds {:.0} GFLOP/s",
        ceilings.read / 1e9,
        ceilings.flops / 1e9
    );
}

struct Bench<'a> {
    settings: &'a BenchSettings,
    phase: Phase,
    source: Arc<WeightSource>,
    devices: Vec<DeviceKind>,
    threads: usize,
}

impl Bench<'_> {
    fn on_gpus(&self) -> bool {
        self.devices[0] != DeviceKind::Cpu
    }

    /// Between several ranks.
    fn transport(&self) -> TransportKind {
        match self.settings.transport {
            Transport::Auto if self.on_gpus() => TransportKind::Ipc,
            Transport::Auto | Transport::Local | Transport::Tcp => TransportKind::Tcp,
            Transport::Ipc => TransportKind::Ipc,
            Transport::Nccl => TransportKind::Nccl,
        }
    }

    /// A group with room for the largest of `batches`.
    fn load(&self, batches: &[usize]) -> Result<Load> {
        let context = self.settings.context as usize;
        let largest = batches.iter().copied().max().unwrap_or(1).max(1);
        let (sequences, tokens_each) = match self.phase {
            // One step more for the profile.
            Phase::Decode => (largest, context + load::DECODE_ROOM + 1),
            Phase::Prefill => (1, largest),
        };
        let workers = self.settings.workers as usize;
        let mut group = GroupConfig::new(self.settings.workers);
        group.threads = self.threads;
        group.devices = self.devices.clone();
        group.transport = self.transport();
        group.modes = Modes {
            deterministic: self.settings.device.deterministic,
            fp8_activations: self.settings.device.fp8_activations.is_on(),
        };
        group.kv_dtype = parts::kv_dtype(self.settings.device.kv_cache_dtype);
        group.max_slots = sequences;
        group.max_logit_rows = sequences.div_ceil(workers);
        group.max_tokens = match self.phase {
            Phase::Decode => largest.max(context),
            Phase::Prefill => largest,
        };
        let pages_each = tokens_each.div_ceil(group.page_tokens);
        group.kv_pages = pages_each * sequences.div_ceil(workers);
        let ranks = LocalGroup::start(&self.source, &group)?;
        let vocab = self.source.spec().vocab as u32;
        Ok(Load::new(ranks, workers, pages_each, context, vocab))
    }

    fn figure(&self, load: &mut Load, batch: usize, ceilings: &Ceilings) -> Result<Value> {
        let began = Instant::now();
        let (first, seconds) = match self.phase {
            Phase::Decode => load.decode(batch)?,
            Phase::Prefill => (Vec::new(), load.prefill(batch)?),
        };
        let total = began.elapsed();
        let mut sorted = seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let mut figure = self.print(ceilings, batch, sorted[sorted.len() / 2]);
        let report = Report::of(self.requests(batch, &first, &seconds), total, batch, None);
        report.print();
        figure["requests"] = report.json();
        if self.settings.profile {
            load.profiled(self.phase, batch)?;
        }
        load.end(if self.phase == Phase::Decode { batch } else { 1 })?;
        Ok(figure)
    }

    /// The steps as the requests that they served, for the table that `serve` prints: in decode one for each sequence,
    /// whose prompt took `first`; in prefill one for each prompt, of one token.
    fn requests(&self, batch: usize, first: &[f64], steps: &[f64]) -> Vec<Result<Timing>> {
        let time = |seconds: &f64| Duration::from_secs_f64(*seconds);
        let timing = |first: &f64, gaps: &[f64], prompt: usize| {
            let first = time(first);
            let gaps: Vec<Duration> = gaps.iter().map(time).collect();
            Ok(Timing {
                total: first + gaps.iter().sum::<Duration>(),
                tokens: gaps.len() as u32 + 1,
                prompt_tokens: prompt as u32,
                first,
                gaps,
                ..Timing::default()
            })
        };
        let context = self.settings.context as usize;
        match self.phase {
            Phase::Decode => first.iter().map(|first| timing(first, steps, context)).collect(),
            Phase::Prefill => steps.iter().map(|step| timing(step, &[], batch)).collect(),
        }
    }

    fn print(&self, ceilings: &Ceilings, batch: usize, seconds: f64) -> Value {
        let spec = self.source.spec();
        let format = StorageFormat::of(spec, self.source.config().quant.as_ref());
        let kv_bytes = match self.settings.device.kv_cache_dtype {
            KvCacheDtype::Bf16 => 2,
            KvCacheDtype::Fp8E4m3 | KvCacheDtype::Fp8E5m2 => 1,
        };
        let tokens = batch as u64;
        let (context, what) = match self.phase {
            Phase::Decode => (u64::from(self.settings.context), "decode, sequences"),
            Phase::Prefill => (0, "prefill, tokens"),
        };
        // GPUs that each read their part, or CPUs that read everything together.
        let ranks = if self.on_gpus() { self.settings.workers } else { 1 };
        let bytes = roofline::busiest_rank_bytes(spec, &format, (tokens, ranks), context, kv_bytes);
        let attention = match self.phase {
            Phase::Decode => roofline::attention_flops(spec, context),
            // Token t sees t + 1 positions: half of all on average. One row of logits, not one per token.
            Phase::Prefill => roofline::attention_flops(spec, tokens / 2),
        };
        let head = 2 * spec.vocab as u64 * spec.hidden as u64;
        let per_token = roofline::flops_per_token(spec) - if self.phase == Phase::Prefill { head } else { 0 };
        let here = match self.phase {
            Phase::Decode => tokens.div_ceil(u64::from(ranks)),
            // The prompt is one rank's, its experts' work everybody's.
            Phase::Prefill => tokens,
        };
        let experts = roofline::expert_flops_per_token(spec);
        let flops =
            (here * (per_token - experts + attention)) as f64 + (tokens * experts) as f64 / f64::from(ranks);
        let by_reading = bytes.seconds(ceilings.read);
        let by_computing = flops / ceilings.flops;
        let floor = by_reading.max(by_computing);
        println!(
            "  {what} {batch:>5}: {:>9.3} ms/step {:>9.1} tok/s {:>7.1} GB/s ({:>3.0}% of reading) {:>8.1} GFLOP/s ({:>3.0}% of peak), floor {:.3} ms: {:.0}% of its speed",
            seconds * 1e3,
            batch as f64 / seconds,
            (bytes.weights + bytes.kv) / seconds / 1e9,
            100.0 * by_reading / seconds,
            flops / seconds / 1e9,
            100.0 * by_computing / seconds,
            floor * 1e3,
            100.0 * floor / seconds,
        );
        json!({
            "batch": batch,
            "context": context,
            "workers": self.settings.workers,
            "ms_per_step": seconds * 1e3,
            "tokens_per_second": batch as f64 / seconds,
            "weight_bytes": bytes.weights,
            "kv_bytes": bytes.kv,
            "flops": flops,
            "read_bytes_per_second": ceilings.read,
            "flops_per_second": ceilings.flops,
            "floor_ms": floor * 1e3,
            "of_floor_speed": floor / seconds,
        })
    }
}
