//! The measurements.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use conclave_kernels::backend::*;
use conclave_kernels::cuda::CudaBackend;

use crate::model::*;

/// Steps that are not counted: graphs are recorded, clocks rise.
const WARM: usize = 8;

/// One decode step of `batch` sequences at `position`.
fn decode_batch(setup: &Setup, batch: usize, position: usize, first: bool) -> Batch {
    let per_run = setup.pages / batch;
    let runs = (0..batch).map(|i| BatchRun {
        first: i as u32,
        len: 1,
        // Pages of all sequences interleaved, as a pool gives them out.
        pages: (0..=position / PAGE)
            .map(|page| (page * batch + i) as u32 % (per_run * batch) as u32)
            .collect(),
        position: position as u32,
    });
    let id = |i: usize| {
        if first {
            (i * 7919 + 13) as u32 % VOCAB as u32
        } else {
            SAMPLED | i as u32
        }
    };
    Batch {
        ids: (0..batch).map(id).collect(),
        positions: vec![position as u32; batch],
        runs: runs.collect(),
        logit_rows: (0..batch as u32).collect(),
    }
}

fn step(setup: &mut Setup, batch: usize, position: usize, first: bool) {
    let params = SampleParams::default();
    let rows: Vec<SampleRow<'_>> = (0..batch)
        .map(|_| SampleRow {
            params: &params,
            position: position as u32 + 1,
            tokens: &[],
            output_start: 0,
            history: None,
            mask: None,
            forbidden: &[],
        })
        .collect();
    let list = decode_batch(setup, batch, position, first);
    setup.backend.begin(&list).unwrap();
    assert!(setup.backend.forward(&setup.logits).unwrap());
    assert!(setup.backend.queue_sample(&setup.logits, VOCAB, &rows).unwrap());
}

pub fn decode(setup: &mut Setup, batch: usize, context: usize, steps: usize) -> String {
    for i in 0..WARM {
        step(setup, batch, context + i, i == 0);
        setup.backend.sampled().unwrap();
    }
    setup.backend.synchronize().unwrap();
    // One step is always queued behind the one that runs: the device never waits.
    let start = Instant::now();
    step(setup, batch, context + WARM, false);
    for i in 1..steps {
        step(setup, batch, context + WARM + i, false);
        setup.backend.sampled().unwrap();
    }
    let tokens = setup.backend.sampled().unwrap();
    let seconds = start.elapsed().as_secs_f64() / steps as f64;
    let alone = replay(setup);
    let failed = tokens.iter().filter(|t| t.error.is_some()).count();
    let chance = 1.0 - TOP_K as f64 / EXPERTS as f64;
    let expected = EXPERTS as f64 * (1.0 - chance.powi(batch as i32));
    let seen = match batch {
        0..=4 => expected,
        _ => setup
            .backend
            .chosen(batch, TOP_K)
            .unwrap()
            .into_iter()
            .collect::<BTreeSet<_>>()
            .len() as f64,
    };
    let experts = if (seen - expected).abs() > 0.1 * expected {
        seen
    } else {
        expected
    };
    let bytes = setup.bytes(batch, context + WARM + steps / 2, experts);
    let floor = bytes / setup.bandwidth;
    println!(
        "decode {batch:4} x {context:6}   {:9.1}  {:9.3}  {:8.3}  {:5.1}%  {:8.2}  {seen:6.1} of {expected:.1} expected, {:.3} ms of it the graph{}",
        batch as f64 / seconds,
        seconds * 1e3,
        floor * 1e3,
        100.0 * floor / seconds,
        bytes / 1e9,
        alone * 1e3,
        if failed > 0 {
            format!("  {failed} rows FAILED")
        } else {
            String::new()
        }
    );
    format!(
        "{{\"case\":\"decode\",\"batch\":{batch},\"context\":{context},\"tokens_per_second\":{:.1},\"ms\":{:.4},\"floor_ms\":{:.4},\"bytes\":{bytes:.0},\"experts\":{experts:.1}}}",
        batch as f64 / seconds,
        seconds * 1e3,
        floor * 1e3
    )
}

/// Seconds of the recorded step alone, one behind the other.
fn replay(setup: &mut Setup) -> f64 {
    let logits = std::mem::replace(&mut setup.logits, Buffer { handle: 0, bytes: 0 });
    let again = |backend: &mut CudaBackend| (0..16).try_for_each(|_| backend.forward(&logits).map(|_| ()));
    let seconds = setup.backend.timed(again).unwrap() / 16.0;
    setup.logits = logits;
    seconds
}

fn prompt(tokens: usize) -> Batch {
    Batch {
        ids: (0..tokens)
            .map(|i| (i * 7919 + 13) as u32 % VOCAB as u32)
            .collect(),
        positions: (0..tokens as u32).collect(),
        runs: vec![BatchRun {
            first: 0,
            len: tokens as u32,
            pages: (0..tokens.div_ceil(PAGE) as u32).collect(),
            position: 0,
        }],
        logit_rows: vec![tokens as u32 - 1],
    }
}

/// Operations of a prompt: weights, and causal attention.
fn operations(layers: usize, tokens: usize) -> (f64, f64) {
    let attention = HIDDEN * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM;
    let layer = attention + EXPERTS * HIDDEN + TOP_K * 3 * HIDDEN * INTER;
    let weights = 2.0 * (layers * layer) as f64 * tokens as f64 + 2.0 * (VOCAB * HIDDEN) as f64;
    let scores = 4.0 * (layers * HEADS * HEAD_DIM) as f64 * tokens as f64 * (tokens as f64 + 1.0) / 2.0;
    (weights, scores)
}

pub fn prefill(setup: &mut Setup, tokens: usize) -> String {
    let list = prompt(tokens);
    let mut best = f64::INFINITY;
    for _ in 0..4 {
        setup.backend.begin(&list).unwrap();
        let logits = std::mem::replace(&mut setup.logits, Buffer { handle: 0, bytes: 0 });
        let seconds = setup
            .backend
            .timed(|backend| backend.forward(&logits).map(|_| ()))
            .unwrap();
        setup.logits = logits;
        best = best.min(seconds);
    }
    let (weights, scores) = operations(setup.layers, tokens);
    println!(
        "prefill {tokens:10}   {:9.1}  {:9.3}  {:.0} TFLOP/s of weights, {:.0} with attention",
        tokens as f64 / best,
        best * 1e3,
        weights / best / 1e12,
        (weights + scores) / best / 1e12
    );
    format!(
        "{{\"case\":\"prefill\",\"tokens\":{tokens},\"tokens_per_second\":{:.1},\"ms\":{:.3},\"weight_flop\":{weights:.0},\"attention_flop\":{scores:.0}}}",
        tokens as f64 / best,
        best * 1e3
    )
}

pub fn profile_decode(setup: &mut Setup, batch: usize, context: usize) {
    for i in 0..3 {
        if i == 2 {
            setup.backend.time_kernels();
        }
        step(setup, batch, context + i, i == 0);
        setup.backend.sampled().unwrap();
    }
    table(
        setup,
        &format!("one decode step, {batch} x {context}, each kernel alone"),
    );
}

/// Where the blocks of the one kernel spend a step of one token: microseconds a layer, at the clock that the whole adds up
/// to.
pub fn trace(setup: &mut Setup, context: usize) {
    const OPS: [&str; 6] = ["qkv", "gate", "attention", "output", "gate and up", "down"];
    if !setup.backend.set_one(true, true).unwrap() {
        return;
    }
    for i in 0..4 {
        step(setup, 1, context + i, i == 0);
        setup.backend.sampled().unwrap();
    }
    let seconds = replay(setup);
    let cycles = setup.backend.one_trace().unwrap();
    setup.backend.set_one(true, false).unwrap();
    let blocks: Vec<&[u64]> = cycles.chunks(4 * (OPS.len() + 1)).collect();
    let layers = setup.layers as f64;
    // The step without the head is what the blocks' cycles add up to.
    let whole = blocks[0][..4 * OPS.len()].iter().sum::<u64>() as f64;
    let step = &blocks[0][4 * OPS.len()..];
    println!(
        "-- one kernel, context {context}: {:.3} ms the step, {:.1} us before the layers, {:.3} ms the layers at {:.2} GHz: {:.0} cycles a layer; mean of blocks (least to most)",
        seconds * 1e3,
        step[0] as f64 / 1e3,
        step[1] as f64 / 1e6,
        whole / step[1] as f64,
        whole / layers
    );
    println!(
        "{:12} {:>22} {:>22} {:>22} {:>22}",
        "op", "waits", "input", "product", "finish"
    );
    for (op, name) in OPS.iter().enumerate() {
        print!("{name:12}");
        for what in 0..4 {
            let of = |block: &&[u64]| block[op * 4 + what] as f64 / layers;
            let all: Vec<f64> = blocks.iter().map(of).collect();
            let mean = all.iter().sum::<f64>() / all.len() as f64;
            let (least, most) = (
                all.iter().copied().fold(f64::MAX, f64::min),
                all.iter().copied().fold(0.0, f64::max),
            );
            print!(" {:>22}", format!("{mean:.0} ({least:.0} to {most:.0})"));
        }
        println!();
    }
}

pub fn profile_prefill(setup: &mut Setup, tokens: usize) {
    let list = prompt(tokens);
    setup.backend.begin(&list).unwrap();
    setup.backend.time_kernels();
    assert!(setup.backend.forward(&setup.logits).unwrap());
    table(setup, &format!("prefill of {tokens}, each kernel alone"));
}

/// Time of each kernel, largest first.
fn table(setup: &mut Setup, title: &str) {
    let times = setup.backend.take_times().unwrap();
    let mut sums: BTreeMap<String, (usize, f64)> = BTreeMap::new();
    for (name, seconds) in times {
        let entry = sums.entry(name).or_default();
        *entry = (entry.0 + 1, entry.1 + seconds);
    }
    let total: f64 = sums.values().map(|entry| entry.1).sum();
    let mut rows: Vec<_> = sums.into_iter().collect();
    rows.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    println!("-- {title}: {:.3} ms in all", total * 1e3);
    for (name, (count, seconds)) in rows {
        println!(
            "{name:32} {count:5} x {:9.2} us  {:5.1}%",
            seconds / count as f64 * 1e6,
            100.0 * seconds / total
        );
    }
}
