//! The op on all threads.

use crate::backend::{Buffer, LinearId, Result};
use crate::cpu::CpuBackend;
use crate::cpu::engine::Engine;
use crate::cpu::weights::{CpuLinear, FP8_BLOCK, Format, INT4_BLOCK};
use crate::ops::linear::{Block, Order, Out, Packed, Tokens, pack};
use crate::simd::run;

/// Tasks per thread: enough that a thread that is held up does not hold up the others.
const TASKS_PER_THREAD: usize = 4;
/// Rows of a task, at most; a multiple of every tile.
const TASK_ROWS: usize = FP8_BLOCK;
/// Tokens that one task packs.
const PACK_TOKENS: usize = 16;

/// One product of a region.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub(crate) weight: &'a CpuLinear,
    pub(crate) x: Tokens<'a>,
    pub(crate) out: Out<'a>,
}

/// All rows of all jobs, as one set of tasks.
pub(crate) fn linears(engine: &mut Engine, jobs: &[Job<'_>]) {
    let isa = engine.isa;
    let rows: usize = jobs.iter().map(|job| job.weight.out_features).sum();
    let part = (rows / (engine.threads() * TASKS_PER_THREAD))
        .next_multiple_of(16)
        .clamp(16, TASK_ROWS);
    let parts = |job: &Job<'_>| job.weight.out_features.div_ceil(part);
    let tasks = jobs.iter().map(parts).sum();
    engine.run(tasks, |mut task, scratch| {
        for job in jobs {
            let parts = parts(job);
            if task < parts {
                let rows = task * part..job.weight.out_features.min((task + 1) * part);
                let block = Block {
                    weight: job.weight,
                    rows,
                    x: job.x,
                    scratch: &mut scratch.linear,
                    out: &job.out,
                };
                return run(isa, block);
            }
            task -= parts;
        }
    });
}

/// Packs `x` (`[tokens, in]`) for each weight in turn and multiplies; weights of one order share a region.
pub(crate) fn linears_of(engine: &mut Engine, packed: &mut Packed, x: &[f32], of: &[(&CpuLinear, Out<'_>)]) {
    let mut rest = of;
    while let Some((first, _)) = rest.first() {
        let order = Order::of(&first.format);
        let count = rest
            .iter()
            .take_while(|(weight, _)| Order::of(&weight.format) == order)
            .count();
        let (now, later) = rest.split_at(count);
        rest = later;
        let columns = first.in_features;
        let tokens = x.len() / columns;
        pack_all(engine, packed, order, x, columns);
        let x = packed.tokens(order, columns, tokens);
        // Three weights at most share an input; an array keeps this off the heap.
        for now in now.chunks(3) {
            let job = |i: usize| Job {
                weight: now[i].0,
                x,
                out: now[i].1,
            };
            match now.len() {
                1 => linears(engine, &[job(0)]),
                2 => linears(engine, &[job(0), job(1)]),
                _ => linears(engine, &[job(0), job(1), job(2)]),
            }
        }
    }
}

/// Packs all rows of `x`, on all threads if there are many.
pub(crate) fn pack_all(engine: &mut Engine, packed: &mut Packed, order: Order, x: &[f32], columns: usize) {
    let isa = engine.isa;
    let tokens = x.len() / columns;
    let to = packed.tokens_mut(order, columns, tokens).shared();
    engine.run_parts(tokens, PACK_TOKENS, |part, _| {
        let x = &x[part.start * columns..part.end * columns];
        // SAFETY: parts are disjoint.
        pack(isa, x, columns, unsafe { to.take(part) });
    });
}

/// Row `row` of the weight as F32 into `out`, each value rounded once.
pub(crate) fn dequantize_row(weight: &CpuLinear, row: usize, out: &mut [f32]) {
    let bytes = &weight.bytes()[row * weight.row_bytes()..][..weight.row_bytes()];
    let out = out.iter_mut().enumerate();
    match &weight.format {
        Format::F32 => out
            .zip(bytes.as_chunks::<4>().0)
            .for_each(|((_, out), b)| *out = f32::from_le_bytes(*b)),
        Format::F16 => out
            .zip(bytes.as_chunks::<2>().0)
            .for_each(|((_, out), b)| *out = half::f16::from_le_bytes(*b).to_f32()),
        Format::Bf16 => out
            .zip(bytes.as_chunks::<2>().0)
            .for_each(|((_, out), b)| *out = half::bf16::from_le_bytes(*b).to_f32()),
        Format::Fp8 { scales } => {
            let scales = &scales[row / FP8_BLOCK * weight.in_features.div_ceil(FP8_BLOCK)..];
            out.zip(bytes).for_each(|((k, out), code)| {
                *out = crate::cpu::float8::e4m3_to_f32(*code) * scales[k / FP8_BLOCK];
            });
        }
        Format::Int4 {
            scales,
            zeros,
            per_chunk,
        } => {
            let (chunks, size) = (weight.in_features.div_ceil(INT4_BLOCK), INT4_BLOCK / per_chunk);
            for (k, out) in out {
                let at = row * chunks * per_chunk + k / size;
                let q = i32::from(bytes[k / 2] >> (4 * (k % 2)) & 15);
                *out = (q - zeros.get(at).map_or(8, |zero| *zero & 0xff)) as f32 * scales[at];
            }
        }
    }
}

impl CpuBackend {
    /// `hidden += x W` for the step's tokens.
    pub(crate) fn run_linear_add(&mut self, weight: LinearId, x: &Buffer, hidden: &Buffer) -> Result<()> {
        const OP: &str = "linear_add";
        let weight = self.weights.linear(OP, "weight", weight)?;
        let tokens = self.step.tokens();
        let shapes = [
            (x, tokens * weight.in_features),
            (hidden, tokens * weight.out_features),
        ];
        let [x, hidden] = self.buffers.words(OP, shapes)?;
        // SAFETY: each result is written by the one task that has its row of the weight.
        let out = unsafe { Out::new(hidden, weight.out_features, true) };
        linears_of(&mut self.engine, &mut self.workspace.packed, x, &[(weight, out)]);
        Ok(())
    }
}
