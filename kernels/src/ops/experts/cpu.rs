//! The op on all threads: rows sorted by expert; then gate, up and silu; then down.

use super::hidden::{Activate, HIDDEN_BLOCK, HIDDEN_ROWS};
use super::weights::CpuExperts;
use super::{CHUNK_ROWS, Hidden};
use crate::backend::{Buffer, ExpertRow, ExpertsId, Result};
use crate::cpu::CpuBackend;
use crate::cpu::check::{expect, mismatch};
use crate::cpu::engine::{Engine, ThreadScratch};
use crate::ops::linear::{Block, Out, Packed, Tokens, pack};
use crate::simd::{Isa, run};

/// Rows that one task packs.
const PACK_ROWS: usize = 16;
/// Outputs of the down projection that one task computes.
const DOWN_BLOCK: usize = 128;

/// Rows sorted by expert; memory of the workspace.
#[derive(Default)]
pub(crate) struct Sorted {
    /// Indices into the op's rows.
    order: Vec<u32>,
    segments: Vec<Segment>,
    /// Per expert, while sorting.
    next: Vec<u32>,
}

/// Rows `first..first + count` of the order belong to `expert`.
#[derive(Clone, Copy)]
struct Segment {
    expert: usize,
    first: usize,
    count: usize,
}

impl Sorted {
    /// Room for `rows` rows of `experts` experts.
    pub(crate) fn reserve(&mut self, rows: usize, experts: usize) {
        self.order.reserve(rows.saturating_sub(self.order.len()));
        // A chunk border can cut a segment in two.
        let segments = experts + rows / CHUNK_ROWS + 1;
        self.segments
            .reserve(segments.saturating_sub(self.segments.len()));
        self.next.reserve(experts.saturating_sub(self.next.len()));
    }

    /// Sorts `rows`, at most `CHUNK_ROWS` of them; rows of one expert keep their order.
    fn sort(&mut self, rows: &[ExpertRow], experts: usize) {
        self.next.clear();
        self.next.resize(experts, 0);
        rows.iter().for_each(|row| self.next[row.expert as usize] += 1);
        self.segments.clear();
        let mut first = 0;
        for (expert, next) in self.next.iter_mut().enumerate() {
            let count = std::mem::replace(next, first as u32) as usize;
            if count > 0 {
                self.segments.push(Segment { expert, first, count });
                first += count;
            }
        }
        self.order.clear();
        self.order.resize(rows.len(), 0);
        for (i, row) in rows.iter().enumerate() {
            let at = &mut self.next[row.expert as usize];
            self.order[*at as usize] = i as u32;
            *at += 1;
        }
    }
}

impl CpuBackend {
    pub(crate) fn run_experts(
        &mut self,
        experts: ExpertsId,
        input: &Buffer,
        rows: &[ExpertRow],
        out: &Buffer,
    ) -> Result<()> {
        const OP: &str = "experts";
        let experts = self.weights.experts(OP, experts)?;
        if experts.experts.is_empty() {
            return expect(OP, "rows for a layer without experts on this rank", rows.len(), 0);
        }
        if rows.len() > self.workspace.max_expert_rows() {
            let most = self.workspace.max_expert_rows();
            return Err(mismatch(
                OP,
                "rows",
                rows.len(),
                format!("at most max_expert_rows {most}"),
            ));
        }
        experts.check_rows(rows)?;
        let inputs = rows.iter().map(|row| row.row as usize + 1).max().unwrap_or(0);
        let shapes = [
            (input, inputs.saturating_mul(experts.hidden)),
            (out, rows.len() * experts.hidden),
        ];
        let [input, out] = self.buffers.words(OP, shapes)?;
        let (w, engine) = (&mut self.workspace, &mut self.engine);
        let outs = out.chunks_mut(CHUNK_ROWS * experts.hidden);
        for (rows, out) in rows.chunks(CHUNK_ROWS).zip(outs) {
            w.sorted.sort(rows, experts.experts.len());
            gather(engine, experts, input, rows, &w.sorted, &mut w.packed);
            let x = w.packed.tokens(experts.orders.0, experts.hidden, rows.len());
            hidden(engine, experts, &w.sorted, x, &mut w.hidden);
            let x = w
                .hidden
                .tokens(experts.orders.1, experts.intermediate, rows.len());
            down(engine, experts, &w.sorted, x, out);
            engine.rounded(out);
        }
        Ok(())
    }
}

/// Packs the inputs in sorted order.
fn gather(
    engine: &mut Engine,
    experts: &CpuExperts,
    input: &[f32],
    rows: &[ExpertRow],
    sorted: &Sorted,
    packed: &mut Packed,
) {
    let (isa, width) = (engine.isa, experts.hidden);
    let to = packed.tokens_mut(experts.orders.0, width, rows.len()).shared();
    engine.run_parts(rows.len(), PACK_ROWS, |part, _| {
        for i in part {
            let row = rows[sorted.order[i] as usize].row as usize;
            // SAFETY: each row is in one part.
            pack(isa, &input[row * width..][..width], width, unsafe {
                to.take(i..i + 1)
            });
        }
    });
}

/// Gate, up and silu: a task is some intermediate values of one expert.
fn hidden(engine: &mut Engine, experts: &CpuExperts, sorted: &Sorted, x: Tokens<'_>, packed: &mut Packed) {
    let (isa, rounds) = (engine.isa, engine.rounds);
    let order = experts.orders.1;
    // What is rounded as one is made by one task; otherwise smaller tasks share the work more evenly.
    let block = packed.whole(order).max(HIDDEN_BLOCK / 2);
    let parts = experts.intermediate.div_ceil(block);
    let to = packed.tokens_mut(order, experts.intermediate, x.count).shared();
    engine.run(sorted.segments.len() * parts, |task, scratch| {
        let segment = sorted.segments[task / parts];
        let expert = &experts.experts[segment.expert];
        let first = task % parts * block;
        let values = first..experts.intermediate.min(first + block);
        let ThreadScratch {
            linear,
            hidden: Hidden { gate, up },
            ..
        } = scratch;
        for start in (segment.first..segment.first + segment.count).step_by(HIDDEN_ROWS) {
            let count = HIDDEN_ROWS.min(segment.first + segment.count - start);
            let words = count * HIDDEN_BLOCK;
            let (gate, up) = (&mut gate.f32_mut()[..words], &mut up.f32_mut()[..words]);
            for (weight, to) in [(&expert.gate, &mut *gate), (&expert.up, &mut *up)] {
                // SAFETY: scratch of this thread alone.
                let out = unsafe { Out::new(to, HIDDEN_BLOCK, false) }.from(first);
                let x = x.slice(start, count);
                run(
                    isa,
                    Block {
                        weight,
                        rows: values.clone(),
                        x,
                        scratch: linear,
                        out: &out,
                    },
                );
            }
            let rows = gate
                .chunks_exact_mut(HIDDEN_BLOCK)
                .zip(up.chunks_exact(HIDDEN_BLOCK));
            for (i, (gate, up)) in rows.enumerate() {
                activate(
                    (isa, rounds),
                    &mut gate[..values.len()],
                    &up[..values.len()],
                    first,
                    start + i,
                    &to,
                );
            }
        }
    });
}

/// Packs one row's part of the hidden layer.
fn activate(
    (isa, rounds): (Isa, bool),
    gate: &mut [f32],
    up: &[f32],
    first: usize,
    row: usize,
    to: &crate::ops::linear::SharedTokens<'_>,
) {
    // SAFETY: tasks share rows but each writes only the chunks of its own intermediate values.
    let mut to = unsafe { to.take_part(row, first, gate.len()) };
    run(
        isa,
        Activate {
            gate,
            up,
            first: 0,
            rounds,
            to: &mut to,
        },
    );
}

/// The down projection: a task is some outputs of one expert.
fn down(engine: &mut Engine, experts: &CpuExperts, sorted: &Sorted, x: Tokens<'_>, out: &mut [f32]) {
    let isa = engine.isa;
    let parts = experts.hidden.div_ceil(DOWN_BLOCK);
    // SAFETY: each row has one expert, and each of its outputs is in one task.
    let out = unsafe { Out::new(out, experts.hidden, false) };
    engine.run(sorted.segments.len() * parts, |task, scratch| {
        let segment = sorted.segments[task / parts];
        let first = task % parts * DOWN_BLOCK;
        let block = Block {
            weight: &experts.experts[segment.expert].down,
            rows: first..experts.hidden.min(first + DOWN_BLOCK),
            x: x.slice(segment.first, segment.count),
            scratch: &mut scratch.linear,
            out: &out.indexed(&sorted.order[segment.first..][..segment.count]),
        };
        run(isa, block);
    });
}
