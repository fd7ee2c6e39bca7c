//! Whole steps: the forward pass of the CUDA backend against the CPU's ops, over batches that mix prompts and decode.

mod alone;
mod pipeline;
mod rows;
mod small;

use std::collections::BTreeMap;

use conclave_kernels::backend::*;

use crate::host::*;
use crate::report::Report;

pub use alone::{alone, distance};
pub use pipeline::pipeline;
pub use rows::rows;
pub use small::{Shape, Small, TOKENS, backends, shapes};

/// Most sequences of a step.
const SEQUENCES: usize = 17;

/// Steps of one conversation each: contexts grow from step to step.
fn steps() -> Vec<Vec<(usize, usize)>> {
    vec![
        vec![(0, 7)],                                  // a short prompt, in passes
        vec![(7, 1)],                                  // one decode token
        vec![(8, 1), (0, 5)],                          // decode beside a prompt
        vec![(9, 1), (5, 1)],                          // two decode tokens
        vec![(10, 1), (6, 1), (0, 2), (0, 3)],         // short prompts
        vec![(11, 1), (7, 1), (2, 1), (3, 1)],         // four
        vec![(12, 1), (8, 1), (3, 1), (4, 1), (0, 1)], // five: grouped
        vec![(13, 1), (9, 1), (4, 1)],                 // three
        vec![(14, 1), (10, 40), (5, 1)],               // from here on by matrix products
        vec![(15, 1), (50, 1), (6, 1), (5, 6), (1, 120)],
        vec![(16, 1), (51, 1), (7, 1), (11, 700), (121, 600)], // prefill beside decode
        vec![(17, 1), (52, 1), (8, 1), (711, 1)],              // long contexts
        vec![(18, 1), (53, 1), (9, 1), (712, 1), (721, 1)],
        vec![(19, 1)], // one token again, short and long
        vec![(20, 1), (54, 1), (10, 1), (713, 1), (722, 3)],
        vec![(21, 1), (55, 1), (11, 1), (714, 1), (725, 1)],
        many(12, [22, 56, 12, 715, 726], 0), // so many that attention makes its queries from whole sums of the products
        many(12, [23, 57, 13, 716, 727], 1),
        many(16, [24, 58, 14, 717, 728], 2),
        many(9, [25, 59, 15, 718, 729], 3),
        many(17, [26, 60, 16, 719, 730], 4), // and again more
    ]
}

/// One token of each of `count` sequences: five at these positions, the others at `rest`.
fn many(count: usize, five: [usize; 5], rest: usize) -> Vec<(usize, usize)> {
    let positions = five.into_iter().chain([rest; SEQUENCES - 5]);
    positions.take(count).map(|position| (position, 1)).collect()
}

pub fn forward(report: &mut Report) {
    let kinds = [
        Kind::Bf16,
        Kind::Fp8,
        Kind::Int4(128, true),
        Kind::Int4(32, false),
    ];
    let [narrow, wide] = shapes();
    // Inputs of the output projection that pairs of blocks share.
    let wide = Shape {
        heads: 24,
        kv_heads: 4,
        ..wide
    };
    for shape in report.some(&[wide, narrow], 1) {
        for kind in kinds {
            let kv = if kind == Kind::Fp8 {
                KvDtype::Fp8E4m3
            } else {
                KvDtype::Bf16
            };
            let (cpu, gpu) = backends();
            let (mut cpu, mut gpu) = (Small::new(cpu, shape, kind, kv), Small::new(gpu, shape, kind, kv));
            let (_, second) = backends();
            let mut by_op = Small::new(second, shape, kind, kv);
            gpu.set_forward();
            let deterministic = || {
                let (_, gpu) = backends();
                let mut model = Small::new(gpu, shape, kind, kv);
                model.set_deterministic(true);
                model
            };
            let (mut exact, mut single) = (deterministic(), deterministic());
            let random = &mut Random(99);
            let tables = batch(
                random,
                &[
                    &[(0, 64), (0, 64), (0, 32), (0, 730), (0, 740)][..],
                    &[(0, 16); SEQUENCES - 5],
                ]
                .concat(),
                128,
                shape.vocab,
            );
            let mut waiting: BTreeMap<&str, (Vec<f32>, Vec<f32>)> = BTreeMap::new();
            for (index, runs) in report.some(&steps(), 10).iter().enumerate() {
                let mut step = Batch::default();
                for (run, table) in runs.iter().zip(&tables.runs) {
                    let first = step.ids.len() as u32;
                    step.ids
                        .extend((0..run.1).map(|_| random.below(shape.vocab) as u32));
                    step.positions.extend((run.0 as u32..).take(run.1));
                    step.runs.push(BatchRun {
                        first,
                        len: run.1 as u32,
                        position: run.0 as u32,
                        pages: table.pages.clone(),
                    });
                }
                let tokens = step.ids.len();
                // Of long steps the decode tokens in front and some of the prompts' tokens.
                step.logit_rows = (0..tokens as u32)
                    .filter(|i| tokens < 200 || *i < 6 || i % 50 == 3)
                    .collect();
                let expected = cpu.ops(&step);
                let name = format!("{kind:?} hidden {} step {index} ({tokens} tokens)", shape.hidden);
                // Passes keep 16 bits of activations; matrix products 8, and then a key of FP8 rounds another way, or a
                // close choice of experts goes to another: small random models show that more than real ones.
                let strict = index < 8;
                let bound = if strict && kv == KvDtype::Bf16 {
                    2e-3
                } else if kv == KvDtype::Bf16 {
                    3e-2
                } else {
                    1e-1
                };
                let share = if strict { 0.35 } else { 0.5 };
                // The middle of one to three rows may be one that goes to another expert: they are judged with the next step's.
                let few = !strict && step.logit_rows.len() < 4;
                let mut compare = |what: &'static str, found: &[f32]| {
                    let rows = waiting.entry(what).or_default();
                    let joined = if rows.0.is_empty() {
                        ""
                    } else {
                        " with the step before"
                    };
                    rows.0.extend(found);
                    rows.1.extend(&expected);
                    if !few {
                        let (found, expected) = std::mem::take(rows);
                        let name = format!("{what} {name}{joined}");
                        report.compare_rows(&name, &found, &expected, shape.vocab, bound, share);
                    }
                };
                compare("by op  ", &by_op.ops(&step));
                compare("forward", &gpu.forward(&step));
                let found = exact.forward(&step);
                compare("exact  ", &found);
                let mut alone = Vec::new();
                for (at, run) in step.runs.iter().enumerate() {
                    // Each sequence by itself, long ones in two chunks: the same bits.
                    let cut = if run.len > 2 { run.len / 2 + 1 } else { run.len };
                    for (first, len) in [(0, cut), (cut, run.len - cut)] {
                        if len == 0 {
                            continue;
                        }
                        let from = (run.first + first) as usize;
                        let part = from as u32..from as u32 + len;
                        let piece = Batch {
                            ids: step.ids[from..from + len as usize].to_vec(),
                            positions: step.positions[from..from + len as usize].to_vec(),
                            runs: vec![BatchRun {
                                first: 0,
                                len,
                                position: run.position + first,
                                pages: step.runs[at].pages.clone(),
                            }],
                            logit_rows: step
                                .logit_rows
                                .iter()
                                .filter(|row| part.contains(row))
                                .map(|row| row - from as u32)
                                .collect(),
                        };
                        alone.extend(single.forward(&piece));
                    }
                }
                report.same_bits(&format!("exact, alone and cut {name}"), &found, &alone);
            }
            let is_judged = waiting.values().all(|rows| rows.0.is_empty());
            assert!(is_judged, "the last step has too few rows");
        }
    }
}
