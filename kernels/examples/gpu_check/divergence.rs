//! What a token's neighbours change: 512 prompts alone, batched, cut at a page's end and continued beside others. With
//! `set_deterministic` ids and logits are the same bits; without it the rate at which sequences part is reported.

use std::time::Instant;

use conclave_kernels::backend::*;
use conclave_kernels::cuda::CudaBackend;

use crate::forward::{Shape, Small};
use crate::host::*;
use crate::report::Report;

const PROMPTS: usize = 512;
const BESIDE: usize = 16;
const GENERATED: usize = 8;
const LONGEST: usize = 84;
/// Pages of one sequence.
const PAGES: usize = (LONGEST + GENERATED).div_ceil(PAGE_TOKENS);

const SHAPE: Shape = Shape {
    hidden: 512,
    heads: 12,
    kv_heads: 2,
    head_dim: 128,
    experts: 32,
    top_k: 8,
    inter: 256,
    vocab: 640,
    layers: 4,
};

/// One sequence's tokens and the logits that each was drawn from.
#[derive(Clone, Default)]
struct Told {
    ids: Vec<u32>,
    logits: Vec<f32>,
}

/// One step of `runs`: (index among those beside each other, tokens, position); the greedy token and logits of each last
/// token.
fn step(model: &mut Small, runs: &[(usize, &[u32], usize)]) -> Vec<(u32, Vec<f32>)> {
    let mut batch = Batch::default();
    for &(place, ids, position) in runs {
        let first = batch.ids.len() as u32;
        batch.ids.extend_from_slice(ids);
        batch.positions.extend((position as u32..).take(ids.len()));
        batch.runs.push(BatchRun {
            first,
            len: ids.len() as u32,
            pages: (0..PAGES).map(|page| (page * BESIDE + place) as u32).collect(),
            position: position as u32,
        });
        batch.logit_rows.push(batch.ids.len() as u32 - 1);
    }
    let logits = model.forward(&batch);
    let best = |row: &[f32]| {
        let best = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b]).then(b.cmp(a)));
        best.unwrap_or(0) as u32
    };
    logits
        .chunks(SHAPE.vocab)
        .map(|row| (best(row), row.to_vec()))
        .collect()
}

/// Prompts beside each other; `cut`: each one's whole pages first, the rest in a second step.
fn generate(model: &mut Small, prompts: &[Vec<u32>], cut: bool) -> Vec<Told> {
    let at = |prompt: &Vec<u32>| {
        if cut {
            (prompt.len() - 1) / PAGE_TOKENS * PAGE_TOKENS
        } else {
            0
        }
    };
    let heads: Vec<_> = prompts
        .iter()
        .enumerate()
        .filter(|(_, prompt)| at(prompt) > 0)
        .collect();
    for (place, prompt) in heads {
        step(model, &[(place, &prompt[..at(prompt)], 0)]);
    }
    let runs: Vec<_> = prompts
        .iter()
        .enumerate()
        .map(|(i, prompt)| (i, &prompt[at(prompt)..], at(prompt)))
        .collect();
    let mut told = vec![Told::default(); prompts.len()];
    let mut last = step(model, &runs);
    for n in 0..GENERATED {
        for (told, (id, logits)) in told.iter_mut().zip(&last) {
            told.ids.push(*id);
            told.logits.extend(logits);
        }
        let ids: Vec<[u32; 1]> = last.iter().map(|(id, _)| [*id]).collect();
        let runs: Vec<_> = ids
            .iter()
            .zip(prompts)
            .enumerate()
            .map(|(i, (id, prompt))| (i, &id[..], prompt.len() + n))
            .collect();
        if n + 1 < GENERATED {
            last = step(model, &runs);
        }
    }
    told
}

fn parted(a: &[Told], b: &[Told]) -> (usize, usize) {
    let bits = |told: &Told| told.logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let pairs = || a.iter().zip(b);
    (
        pairs().filter(|(a, b)| a.ids != b.ids).count(),
        pairs().filter(|(a, b)| bits(a) != bits(b)).count(),
    )
}

pub fn check(report: &mut Report) {
    for deterministic in [true, false] {
        let backend = CudaBackend::new(limits(1400, 40, 70), 0).unwrap();
        let mut model = Small::new(Box::new(backend), &SHAPE, Kind::Int4(128, true), KvDtype::Bf16);
        model.set_deterministic(deterministic);
        let random = &mut Random(2026);
        let prompts: Vec<Vec<u32>> = (0..PROMPTS)
            .map(|_| {
                let len = 4 + random.below(LONGEST - 4);
                (0..len).map(|_| random.below(SHAPE.vocab) as u32).collect()
            })
            .collect();
        let mut run = |beside: usize, cut: bool| {
            let start = Instant::now();
            let told: Vec<Told> = prompts
                .chunks(beside)
                .flat_map(|some| generate(&mut model, some, cut))
                .collect();
            (told, start.elapsed().as_secs_f64())
        };
        let (alone, first) = run(1, false);
        for (what, beside, cut) in [
            ("alone again", 1, false),
            ("batched, cold", BESIDE, false),
            ("alone, from a prefix", 1, true),
            ("batched, from a prefix", BESIDE, true),
        ] {
            let (told, seconds) = run(beside, cut);
            let (ids, logits) = parted(&alone, &told);
            let mode = if deterministic { "deterministic" } else { "fast" };
            report.expect(
                &format!("{mode}: {PROMPTS} prompts {what} ({seconds:.2} s, alone {first:.2} s)"),
                !deterministic || logits == 0,
                &format!("{ids} ids, {logits} logits part"),
            );
        }
    }
}
