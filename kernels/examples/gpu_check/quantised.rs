//! FP8 weights times quantised activations: whole steps of many tokens against the CPU backend in the same mode.

use conclave_kernels::backend::*;

use crate::forward::{Shape, Small, backends, distance, shapes};
use crate::host::*;
use crate::pair;
use crate::report::Report;

/// Prompts of one step; some experts get few rows, some several tiles.
const STEPS: [&[(usize, usize)]; 3] = [&[(0, 129)], &[(0, 1), (0, 3), (0, 330), (0, 77)], &[(0, 1100)]];
/// Of at most 128 tokens, in which experts see whole activations.
const FEW_STEPS: [&[(usize, usize)]; 4] = [
    &[(0, 17)],
    &[(0, 1), (0, 3), (0, 60)],
    &[(0, 1), (0, 30), (0, 65)],
    &[(0, 128)],
];

pub fn check(report: &mut Report) {
    products(report);
    let [first, second] = shapes();
    // A hidden width of many steps, an odd number of tiles of 256 rows, one expert for most rows.
    let wide = Shape {
        hidden: 3072,
        heads: 10,
        kv_heads: 2,
        head_dim: 128,
        experts: 3,
        top_k: 2,
        inter: 640,
        vocab: 300,
        layers: 1,
    };
    let shapes = [second, first, wide];
    for shape in report.some(&shapes, 1) {
        for &runs in report.some(&STEPS, 2) {
            step(report, shape, runs, Kind::Fp8);
        }
        for &runs in report.some(&FEW_STEPS, 4) {
            step(report, shape, runs, Kind::Bf16);
        }
    }
}

/// One product: both sides quantise the same F32 values, so only the order of summation differs.
fn products(report: &mut Report) {
    let shapes = [
        (128, 128, 129),
        (96, 384, 200),
        (100, 640, 100),
        (100, 640, 259),
        (320, 3072, 17),
        (320, 3072, 131),
        (192, 8192, 33),
        (1536, 768, 128),
        (1536, 768, 1030),
    ];
    let (mut cpu, mut gpu) = pair(&limits(1030, 1, 80));
    for backend in [&mut cpu, &mut gpu] {
        assert!(backend.set_fp8_activations(true).unwrap());
    }
    for &(outputs, inputs, tokens) in report.some(&shapes, 3) {
        let mut results = Vec::new();
        for backend in [&mut cpu, &mut gpu] {
            let random = &mut Random(outputs as u64 + 3);
            let weight = backend
                .upload_linear(&linear(random, outputs, inputs, Kind::Fp8))
                .unwrap();
            let mut values = random.values(tokens * inputs, 2.0);
            // A token of zeros, one of tiny values.
            values[inputs..2 * inputs].fill(0.0);
            values[2 * inputs..3 * inputs]
                .iter_mut()
                .for_each(|x| *x *= 1e-12);
            let x = upload(backend.as_mut(), &values);
            let hidden = upload(backend.as_mut(), &random.values(tokens * outputs, 0.5));
            backend.begin(&batch(random, &[(0, tokens)], 80, 10)).unwrap();
            backend.linear_add(weight, &x, &hidden).unwrap();
            results.push(download(backend.as_mut(), &hidden, tokens * outputs));
        }
        let name = format!("fp8 activations linear_add [{outputs}, {inputs}] x {tokens}");
        report.compare(&name, &results[1], &results[0], 2e-3);
    }
}

/// FP8 attention, `experts` of the kind.
fn step(report: &mut Report, shape: &Shape, runs: &[(usize, usize)], experts: Kind) {
    let (mut cpu, mut gpu) = backends();
    let (plain, _) = backends();
    for backend in [&mut cpu, &mut gpu] {
        assert!(backend.set_fp8_activations(true).unwrap());
    }
    let [mut cpu, mut gpu, mut plain] =
        [cpu, gpu, plain].map(|backend| Small::of(backend, shape, (Kind::Fp8, experts), KvDtype::Bf16));
    gpu.set_forward();
    let random = &mut Random(runs.len() as u64);
    let mut step = batch(random, runs, 128, shape.vocab);
    let tokens = step.ids.len();
    step.logit_rows = (0..tokens as u32)
        .filter(|i| i % 9 == 2 || *i + 1 == tokens as u32)
        .collect();
    let name = format!("hidden {}, {tokens} tokens in {} runs", shape.hidden, runs.len());
    let (expected, found) = (cpu.ops(&step), gpu.forward(&step));
    println!(
        "{:8} {:9.2e}          CPU without quantised activations: {name}",
        "",
        distance(&plain.ops(&step), &expected)
    );
    // What differs by rounding lands on another code now and then, and every quantisation after it widens that: this
    // finds wrong places and scales, `products` the rest.
    report.compare_rows(
        &format!("fp8 activations {name}"),
        &found,
        &expected,
        shape.vocab,
        0.15,
        0.1,
    );
    let again = gpu.forward(&step);
    report.same_bits(&format!("fp8 activations again {name}"), &found, &again);
}
