//! `--scenario decode|prefill`: a model's steps through the workers' executor and exchange, without a router.
//!
//! Steps are sent ahead as a router sends them. Beside each figure stands the floor: the step's bytes over the measured
//! read bandwidth, or its operations over the measured peak, whichever takes longer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use conclave_kernels::backend::Ceilings;
use conclave_kernels::bench::Floors;
use conclave_kernels::cpu::Isa;
use conclave_plan::roofline;
use conclave_plan::storage::StorageFormat;
use conclave_proto::cluster::v1 as wire;
use conclave_worker::device::{DeviceKind, MAX_IN_FLIGHT};
use conclave_worker::verify::{GroupConfig, LocalGroup, Looks, greedy, run as run_of, start as start_of};
use conclave_worker::weights::WeightSource;
use serde_json::{Value, json};

use super::{profile, results};
use crate::settings::{BenchSettings, KvCacheDtype, LoadFormat};
use crate::{model_path, parts};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Decode,
    Prefill,
}

/// Each figure is the median of at least so many steps, for at least so long.
const LEAST_STEPS: usize = 5;
const MEASURE: Duration = Duration::from_secs(3);
/// Steps that are not counted: graphs are recorded, clocks rise.
const WARM: usize = 4;
/// Tokens that are decoded at most while measuring.
const DECODE_ROOM: usize = 192;

pub fn run(settings: &BenchSettings, phase: Phase) -> Result<()> {
    let found = model_path::find(&settings.model)?;
    let device = DeviceKind::choose(&settings.device.device)?;
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
        device,
        threads,
    };
    let mut figures = Vec::new();
    match device {
        DeviceKind::Cpu => {
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
        DeviceKind::Cuda(_) => {
            // The model is loaded once.
            let began = Instant::now();
            let mut load = bench.load(&settings.batch)?;
            let seconds = began.elapsed().as_secs_f64();
            let (on, ceilings) = load.device_facts()?;
            print_ceilings(&found.name, &on, &ceilings);
            println!("  loaded after {seconds:.1} s");
            for &batch in &settings.batch {
                figures.push(bench.figure(&mut load, batch, &ceilings)?);
            }
        }
    }
    let name = if phase == Phase::Decode {
        "decode"
    } else {
        "prefill"
    };
    results::write(settings.result_filename.as_deref(), name, &Value::Array(figures))
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
    device: DeviceKind,
    threads: usize,
}

impl Bench<'_> {
    /// A group with room for the largest of `batches`.
    fn load(&self, batches: &[usize]) -> Result<Load> {
        let context = self.settings.context as usize;
        let largest = batches.iter().copied().max().unwrap_or(1).max(1);
        let (sequences, tokens_each) = match self.phase {
            // One step more for the profile.
            Phase::Decode => (largest, context + DECODE_ROOM + 1),
            Phase::Prefill => (1, largest),
        };
        let workers = self.settings.workers as usize;
        let mut group = GroupConfig::new(self.settings.workers);
        group.threads = self.threads;
        group.device = self.device;
        group.deterministic = self.settings.device.deterministic;
        group.kv_dtype = parts::kv_dtype(self.settings.device.kv_cache_dtype);
        group.max_slots = sequences;
        group.max_logit_rows = sequences.div_ceil(workers);
        group.max_tokens = match self.phase {
            Phase::Decode => largest.max(context),
            Phase::Prefill => largest,
        };
        let pages_each = tokens_each.div_ceil(group.page_tokens);
        group.kv_pages = pages_each * sequences.div_ceil(workers);
        Ok(Load {
            ranks: LocalGroup::start(&self.source, &group)?,
            workers,
            pages_each,
            context,
            steps: 0,
            vocab: self.source.spec().vocab as u32,
        })
    }

    fn figure(&self, load: &mut Load, batch: usize, ceilings: &Ceilings) -> Result<Value> {
        let mut seconds = match self.phase {
            Phase::Decode => load.decode(batch)?,
            Phase::Prefill => load.prefill(batch)?,
        };
        seconds.sort_by(f64::total_cmp);
        let figure = self.print(ceilings, batch, seconds[seconds.len() / 2]);
        if self.settings.profile {
            let step = match self.phase {
                Phase::Decode => load.decode_step(batch, load.context + load.steps),
                Phase::Prefill => load.prefill_step(batch, true, 0),
            };
            load.profiled(step, self.phase, batch)?;
        }
        load.end(if self.phase == Phase::Decode { batch } else { 1 })?;
        Ok(figure)
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
        let bytes = roofline::step_bytes(spec, &format, tokens, context, kv_bytes);
        let attention = match self.phase {
            Phase::Decode => roofline::attention_flops(spec, context),
            // Token t sees t + 1 positions: half of all on average. One row of logits, not one per token.
            Phase::Prefill => roofline::attention_flops(spec, tokens / 2),
        };
        let head = 2 * spec.vocab as u64 * spec.hidden as u64;
        let per_token = roofline::flops_per_token(spec) - if self.phase == Phase::Prefill { head } else { 0 };
        let flops = (tokens * (per_token + attention)) as f64;
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

struct Load {
    ranks: LocalGroup,
    workers: usize,
    pages_each: usize,
    context: usize,
    vocab: u32,
    /// Steps that the last measurement took.
    steps: usize,
}

impl Load {
    /// Sequence `index` lives on rank `index % workers`.
    fn start(&self, index: usize, prompt: usize) -> wire::SlotStart {
        let slot = (index / self.workers) as u32;
        let first = slot as usize * self.pages_each;
        let pages = (first..first + self.pages_each).map(|page| page as u32).collect();
        start_of(slot, pages, prompt, greedy())
    }

    fn tokens(&self, count: usize, salt: usize) -> Vec<u32> {
        (0..count)
            .map(|i| ((i * 7919 + salt * 104_729 + 13) as u32) % self.vocab)
            .collect()
    }

    fn decode_step(&self, sequences: usize, position: usize) -> Vec<wire::Step> {
        let mut steps = vec![wire::Step::default(); self.workers];
        for index in 0..sequences {
            let slot = (index / self.workers) as u32;
            steps[index % self.workers]
                .runs
                .push(run_of(slot, position, &[], true));
        }
        steps
    }

    fn prefill_step(&self, tokens: usize, again: bool, salt: usize) -> Vec<wire::Step> {
        let mut steps = vec![wire::Step::default(); self.workers];
        if again {
            steps[0].end_slots.push(0);
        }
        steps[0].start_slots.push(self.start(0, tokens));
        steps[0].runs.push(run_of(0, 0, &self.tokens(tokens, salt), true));
        steps
    }

    /// Gives each sequence its context, one after the other, then times steps of one token each.
    fn decode(&mut self, sequences: usize) -> Result<Vec<f64>> {
        for index in 0..sequences {
            let mut steps = vec![wire::Step::default(); self.workers];
            let step = &mut steps[index % self.workers];
            step.start_slots.push(self.start(index, self.context));
            let slot = (index / self.workers) as u32;
            step.runs
                .push(run_of(slot, 0, &self.tokens(self.context, index), true));
            self.ranks.step(steps, false)?;
        }
        let context = self.context;
        self.timed(DECODE_ROOM, |load, step| {
            load.decode_step(sequences, context + step)
        })
    }

    /// The same prompt again and again, each time on a fresh slot; ranks without a share take part.
    fn prefill(&mut self, tokens: usize) -> Result<Vec<f64>> {
        self.timed(usize::MAX, |load, step| load.prefill_step(tokens, step > 0, step))
    }

    /// Seconds between the ends of steps that are sent ahead, at most `most` of them.
    fn timed(&mut self, most: usize, step: impl Fn(&Load, usize) -> Vec<wire::Step>) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        let (mut sent, mut began) = (0, Instant::now());
        let mut last = began;
        for done in 0..most {
            while sent < most.min(done + MAX_IN_FLIGHT) {
                let steps = step(self, sent);
                self.ranks.submit(steps, &Looks::Nothing);
                sent += 1;
            }
            self.ranks.collect()?;
            let now = Instant::now();
            if done < WARM {
                began = now;
            } else {
                times.push((now - last).as_secs_f64());
            }
            last = now;
            if times.len() >= LEAST_STEPS && began.elapsed() > MEASURE {
                break;
            }
        }
        for _ in times.len() + WARM..sent {
            self.ranks.collect()?;
        }
        self.steps = sent;
        Ok(times)
    }

    /// The first `sequences` slots.
    fn end(&mut self, sequences: usize) -> Result<()> {
        let mut steps = vec![wire::Step::default(); self.workers];
        for index in 0..sequences {
            steps[index % self.workers]
                .end_slots
                .push((index / self.workers) as u32);
        }
        self.ranks.step(steps, false)?;
        Ok(())
    }

    /// What the device is and what it reaches.
    fn device_facts(&mut self) -> Result<(String, Ceilings)> {
        let (give, take) = std::sync::mpsc::channel();
        self.ranks.work(move |rank| {
            let about = rank.executor.describe_backend();
            let ceilings = rank.executor.backend().measure_ceilings();
            let ceilings = ceilings.map_err(|error| error.to_string())?;
            // The other end waits for it.
            let _ = give.send((about, ceilings));
            Ok(())
        })?;
        let (about, ceilings) = take.recv()?;
        Ok((
            about,
            ceilings.ok_or_else(|| anyhow!("this device measures no ceilings"))?,
        ))
    }

    fn profiled(&mut self, steps: Vec<wire::Step>, phase: Phase, batch: usize) -> Result<()> {
        self.ranks.work(|rank| {
            let started = rank.executor.backend().start_profile();
            started.map_err(|error| error.to_string())
        })?;
        self.ranks.step(steps, false)?;
        let (give, take) = std::sync::mpsc::channel();
        self.ranks.work(move |rank| {
            let kernels = rank.executor.backend().take_profile();
            let _ = give.send(kernels.map_err(|error| error.to_string())?);
            Ok(())
        })?;
        profile::print(&format!("one step of {phase:?} {batch}"), &take.recv()?);
        Ok(())
    }
}
