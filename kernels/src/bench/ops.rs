//! Each op of a layer at one model's shapes, as the worker calls it, beside its floor.

use std::fmt;
use std::time::{Duration, Instant};

use super::Floors;
use super::model::{Model, OPS};
use crate::backend::Result;
use crate::cpu::Isa;
use crate::dummy::DummyFormat;

/// From so many tokens on, the batch is one prompt; below, sequences of one token each.
const PREFILL_TOKENS: usize = 65;
/// Steps are repeated for at least so long, three times at least; figures are medians.
const MEASURE: Duration = Duration::from_secs(2);

/// A model's shape.
#[derive(Clone, Debug)]
pub struct Shape {
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub experts: usize,
    pub top_k: usize,
    pub intermediate: usize,
    pub vocab: usize,
    /// Positions before the token that a sequence decodes.
    pub context: usize,
}

impl Default for Shape {
    /// 1.18B parameters in MiniMax-M2's architecture, 0.26B active.
    fn default() -> Shape {
        Shape {
            layers: 20,
            hidden: 1024,
            heads: 16,
            kv_heads: 4,
            head_dim: 128,
            experts: 32,
            top_k: 4,
            intermediate: 512,
            vocab: 32000,
            context: 128,
        }
    }
}

/// One op over all layers of a step; the last row of a table is the whole step.
#[derive(Clone, Debug)]
pub struct OpBench {
    pub op: &'static str,
    /// `8 x [1024, 4096]`: tokens and what the op multiplies with, in one layer.
    pub shape: String,
    pub format: &'static str,
    pub tokens: usize,
    /// Seconds, the median over steps.
    pub seconds: f64,
    /// Bytes of weights and cache that must be read.
    pub bytes: f64,
    pub flops: f64,
    /// The larger of bytes / read bandwidth and flops / peak, in seconds.
    pub floor: f64,
    /// `floor / seconds`: 1 is the best possible.
    pub ratio: f64,
}

impl fmt::Display for OpBench {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:<10} {:<24} {:<5} {:>9.3} ms {:>8.1} MB {:>6.1} GB/s {:>7.1} GFLOP/s  floor {:>8.3} ms  {:>4.0}%",
            self.op,
            self.shape,
            self.format,
            self.seconds * 1e3,
            self.bytes / 1e6,
            self.bytes / self.seconds / 1e9,
            self.flops / self.seconds / 1e9,
            self.floor * 1e3,
            self.ratio * 100.0
        )
    }
}

/// Bytes of `values` weights.
fn bytes(format: DummyFormat, values: f64) -> f64 {
    match format {
        DummyFormat::F32 => values * 4.0,
        DummyFormat::F16 | DummyFormat::Bf16 => values * 2.0,
        DummyFormat::Fp8Block => values,
        DummyFormat::Int4 { group } => values * (0.5 + 4.0 / group as f64),
    }
}

/// Runs a step of `tokens` tokens of the model with random weights and returns a row per op, then one for the step.
/// Embedding and head are BF16, the gate F32, as in released checkpoints. `OutOfMemory` if the model does not fit.
pub fn bench_ops(
    shape: &Shape,
    format: DummyFormat,
    tokens: usize,
    threads: usize,
    isa: Isa,
    floors: &Floors,
) -> Result<Vec<OpBench>> {
    let prefill = tokens >= PREFILL_TOKENS;
    let mut model = Model::new(shape, format, tokens, prefill, threads, isa)?;
    model.step()?;
    let mut steps = Vec::new();
    let start = Instant::now();
    while steps.len() < 3 || start.elapsed() < MEASURE {
        steps.push(model.step()?);
    }
    let experts = steps.iter().map(|step| step.experts).sum::<usize>() as f64 / steps.len() as f64;

    let layers = shape.layers as f64;
    let t = tokens as f64;
    let (hidden, q) = (shape.hidden, shape.heads * shape.head_dim);
    let kv = shape.kv_heads * shape.head_dim;
    let rows = if prefill { 1.0 } else { t };
    // Positions that all tokens see together.
    let seen = if prefill {
        t * (t + 1.0) / 2.0
    } else {
        t * (shape.context + 1) as f64
    };
    let kv_bytes = if prefill { t } else { seen } * 4.0 * kv as f64;
    let expert = (3 * hidden * shape.intermediate) as f64;
    let qkv = (hidden * (q + 2 * kv)) as f64;
    let head = (shape.vocab * hidden) as f64;
    let gate = (shape.experts * hidden) as f64;
    // Shape, bytes and multiply-adds of each op.
    let work: [(String, f64, f64); OPS.len()] = [
        (format!("{tokens} x {hidden}"), t * 2.0 * hidden as f64, 0.0),
        (
            format!("{tokens} x [{hidden}, {}]", q + 2 * kv),
            layers * bytes(format, qkv),
            layers * t * qkv,
        ),
        (
            format!("{tokens} x {} heads x {}", shape.heads, shape.head_dim),
            layers * kv_bytes,
            layers * seen * 2.0 * q as f64,
        ),
        (
            format!("{tokens} x [{q}, {hidden}]"),
            layers * bytes(format, (q * hidden) as f64),
            layers * t * (q * hidden) as f64,
        ),
        (
            format!("{tokens} x [{hidden}, {}]", shape.experts),
            layers * 4.0 * gate,
            layers * t * gate,
        ),
        (
            format!("{tokens} x {} of {}", shape.top_k, shape.experts),
            bytes(format, experts * expert),
            layers * t * shape.top_k as f64 * expert,
        ),
        (
            format!("{tokens} x {} x {hidden}", shape.top_k),
            0.0,
            layers * t * (shape.top_k * hidden) as f64,
        ),
        (
            format!("{rows} x [{hidden}, {}]", shape.vocab),
            2.0 * head,
            rows * head,
        ),
        (format!("{rows} x {}", shape.vocab), 0.0, 0.0),
    ];
    let median = |of: &dyn Fn(&super::model::Step) -> Duration| {
        let mut times: Vec<Duration> = steps.iter().map(of).collect();
        times.sort();
        times[times.len() / 2].as_secs_f64()
    };
    let row = |op, shape, seconds: f64, bytes: f64, flops: f64| {
        let floor = (bytes / floors.read).max(flops / floors.flops);
        let format = format.name();
        OpBench {
            op,
            shape,
            format,
            tokens,
            seconds,
            bytes,
            flops,
            floor,
            ratio: floor / seconds,
        }
    };
    let mut table: Vec<OpBench> = (work.into_iter().zip(OPS).enumerate())
        .map(|(i, ((shape, bytes, adds), op))| {
            row(op, shape, median(&|step| step.times[i]), bytes, 2.0 * adds)
        })
        .collect();
    let seconds = median(&|step| step.times.iter().sum());
    let all = |of: &dyn Fn(&OpBench) -> f64| table.iter().map(of).sum::<f64>();
    let (bytes, flops) = (all(&|row| row.bytes), all(&|row| row.flops));
    table.push(row(
        "step",
        format!("{:.1} tokens/s", t / seconds),
        seconds,
        bytes,
        flops,
    ));
    Ok(table)
}
