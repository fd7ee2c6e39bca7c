//! `--scenario decode|prefill`: a model's steps through the workers' executor and exchange, without a router.
//!
//! Beside each figure stands the floor: the step's bytes over the measured read bandwidth, or its operations over the
//! measured peak, whichever takes longer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use conclave_kernels::bench::Floors;
use conclave_kernels::cpu::Isa;
use conclave_plan::roofline;
use conclave_plan::storage::StorageFormat;
use conclave_proto::cluster::v1 as wire;
use conclave_worker::verify::{GroupConfig, LocalGroup, greedy, run as run_of, start as start_of};
use conclave_worker::weights::WeightSource;

use crate::settings::{BenchSettings, KvCacheDtype, LoadFormat};
use crate::{model_path, parts};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    Decode,
    Prefill,
}

/// Tokens that each sequence has before decode is measured.
const CONTEXT: usize = 128;
/// Each figure is the median of at least so many steps, for at least so long.
const LEAST_STEPS: usize = 5;
const MEASURE: Duration = Duration::from_secs(3);
/// Room for tokens that are decoded while measuring.
const DECODE_ROOM: usize = 4096;

pub fn run(settings: &BenchSettings, phase: Phase) -> Result<()> {
    let found = model_path::find(&settings.model)?;
    let threads = super::threads(settings);
    let overrides = settings.model.hf_overrides.as_ref();
    let all_threads = threads * settings.workers as usize;
    let source = match settings.model.load_format {
        LoadFormat::Safetensors => WeightSource::open(&found.path, overrides)?,
        LoadFormat::Dummy => {
            WeightSource::dummy(&found.path, overrides, settings.model.dummy_seed, all_threads)?
        }
    };
    let source = Arc::new(source);
    let floors = Floors::measure(all_threads, Isa::detect())?;
    println!(
        "{} on {} workers x {threads} threads, {}: reads {:.1} GB/s, multiply-adds {:.0} GFLOP/s",
        found.name,
        settings.workers,
        Isa::detect().name(),
        floors.read / 1e9,
        floors.flops / 1e9
    );
    for &batch in &settings.batch {
        let figure = measure(settings, phase, &source, threads, batch)?;
        print(settings, phase, &source, &floors, batch, figure);
    }
    Ok(())
}

/// Seconds of the median step.
fn measure(
    settings: &BenchSettings,
    phase: Phase,
    source: &Arc<WeightSource>,
    threads: usize,
    batch: usize,
) -> Result<f64> {
    let tokens_each = match phase {
        Phase::Decode => CONTEXT + DECODE_ROOM,
        Phase::Prefill => batch,
    };
    let sequences = if phase == Phase::Decode { batch } else { 1 };
    let mut group = GroupConfig::new(settings.workers);
    group.threads = threads;
    group.kv_dtype = parts::kv_dtype(settings.kv_cache_dtype);
    group.max_slots = sequences.max(1);
    group.max_tokens = batch.max(CONTEXT);
    let pages_each = tokens_each.div_ceil(group.page_tokens);
    group.kv_pages = pages_each * sequences;
    let mut load = Load {
        ranks: LocalGroup::start(source, &group)?,
        workers: settings.workers as usize,
        pages_each,
        vocab: source.spec().vocab as u32,
    };
    let mut seconds = match phase {
        Phase::Decode => load.decode(sequences)?,
        Phase::Prefill => load.prefill(batch)?,
    };
    seconds.sort_by(f64::total_cmp);
    Ok(seconds[seconds.len() / 2])
}

struct Load {
    ranks: LocalGroup,
    workers: usize,
    pages_each: usize,
    vocab: u32,
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

    /// Gives each sequence its context, one after the other, then times steps of one token each.
    fn decode(&mut self, sequences: usize) -> Result<Vec<f64>> {
        for index in 0..sequences {
            let mut steps = vec![wire::Step::default(); self.workers];
            let step = &mut steps[index % self.workers];
            step.start_slots.push(self.start(index, CONTEXT));
            let slot = (index / self.workers) as u32;
            step.runs
                .push(run_of(slot, 0, &self.tokens(CONTEXT, index), true));
            self.ranks.step(steps, false)?;
        }
        let mut times = Vec::new();
        let began = Instant::now();
        for position in CONTEXT..CONTEXT + DECODE_ROOM {
            let mut steps = vec![wire::Step::default(); self.workers];
            for index in 0..sequences {
                let slot = (index / self.workers) as u32;
                steps[index % self.workers]
                    .runs
                    .push(run_of(slot, position, &[], true));
            }
            let started = Instant::now();
            self.ranks.step(steps, false)?;
            times.push(started.elapsed().as_secs_f64());
            if times.len() >= LEAST_STEPS && began.elapsed() > MEASURE {
                break;
            }
        }
        Ok(times)
    }

    /// The same prompt again and again, each time on a fresh slot; ranks without a share take part.
    fn prefill(&mut self, tokens: usize) -> Result<Vec<f64>> {
        let mut times = Vec::new();
        let began = Instant::now();
        while times.len() < LEAST_STEPS || began.elapsed() < MEASURE {
            let mut steps = vec![wire::Step::default(); self.workers];
            if !times.is_empty() {
                steps[0].end_slots.push(0);
            }
            steps[0].start_slots.push(self.start(0, tokens));
            steps[0]
                .runs
                .push(run_of(0, 0, &self.tokens(tokens, times.len()), true));
            let started = Instant::now();
            self.ranks.step(steps, false)?;
            times.push(started.elapsed().as_secs_f64());
        }
        Ok(times)
    }
}

fn print(
    settings: &BenchSettings,
    phase: Phase,
    source: &WeightSource,
    floors: &Floors,
    batch: usize,
    seconds: f64,
) {
    let spec = source.spec();
    let format = StorageFormat::of(spec, source.config().quant.as_ref());
    let kv_bytes = match settings.kv_cache_dtype {
        KvCacheDtype::Bf16 => 2,
        KvCacheDtype::Fp8E4m3 | KvCacheDtype::Fp8E5m2 => 1,
    };
    let tokens = batch as u64;
    let (context, what) = match phase {
        Phase::Decode => (CONTEXT as u64, "decode, sequences"),
        Phase::Prefill => (0, "prefill, tokens"),
    };
    let bytes = roofline::step_bytes(spec, &format, tokens, context, kv_bytes);
    let attention = match phase {
        Phase::Decode => roofline::attention_flops(spec, context),
        // Token t sees t + 1 positions: half of all on average. One row of logits, not one per token.
        Phase::Prefill => roofline::attention_flops(spec, tokens / 2),
    };
    let head = 2 * spec.vocab as u64 * spec.hidden as u64;
    let per_token = roofline::flops_per_token(spec) - if phase == Phase::Prefill { head } else { 0 };
    let flops = (tokens * (per_token + attention)) as f64;
    let by_reading = bytes.seconds(floors.read);
    let by_computing = flops / floors.flops;
    println!(
        "  {what} {batch:>5}: {:>9.3} ms/step {:>9.1} tok/s {:>7.1} GB/s ({:>3.0}% of reading) {:>8.1} GFLOP/s ({:>3.0}% of peak)",
        seconds * 1e3,
        batch as f64 / seconds,
        (bytes.weights + bytes.kv) / seconds / 1e9,
        100.0 * by_reading / seconds,
        flops / seconds / 1e9,
        100.0 * by_computing / seconds,
    );
}
