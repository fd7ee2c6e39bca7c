//! Sampling by itself: rows of the model's vocabulary in each kind, on the device and by way of the host.

use std::time::Instant;

use conclave_kernels::backend::*;
use conclave_kernels::cpu::CpuBackend;
use conclave_kernels::cuda::CudaBackend;

use crate::model::VOCAB;

const STEPS: usize = 50;
/// Tokens before, where penalties look at them.
const HISTORY: usize = 8192;

/// What a row of the kind asks for.
struct Kind {
    name: &'static str,
    params: SampleParams,
    mask: bool,
    /// The device keeps the tokens, but for the first step.
    kept: bool,
}

fn kinds() -> Vec<Kind> {
    let greedy = SampleParams {
        seed: 7,
        ..SampleParams::default()
    };
    let drawn = SampleParams {
        temperature: 1.0,
        ..greedy.clone()
    };
    let kind = |name, mask, params: SampleParams| Kind {
        name,
        params,
        mask,
        kept: false,
    };
    let penalties = SampleParams {
        repetition_penalty: 1.1,
        frequency_penalty: 0.1,
        ..greedy.clone()
    };
    vec![
        kind("greedy", false, greedy.clone()),
        kind("drawn", false, drawn.clone()),
        kind(
            "drawn, top-p 0.95",
            false,
            SampleParams {
                top_p: 0.95,
                ..drawn.clone()
            },
        ),
        kind(
            "drawn, top-k 40, top-p 0.95",
            false,
            SampleParams {
                top_p: 0.95,
                top_k: 40,
                ..drawn.clone()
            },
        ),
        kind(
            "log-probabilities, best 5",
            false,
            SampleParams {
                logprobs: Some(5),
                ..greedy.clone()
            },
        ),
        kind(
            "log-probabilities, best 20",
            false,
            SampleParams {
                logprobs: Some(20),
                ..greedy.clone()
            },
        ),
        kind("mask", true, greedy.clone()),
        kind(
            "mask, drawn, best 20",
            true,
            SampleParams {
                logprobs: Some(20),
                top_p: 0.95,
                ..drawn
            },
        ),
        kind("penalties, 8,192 tokens sent", false, penalties.clone()),
        Kind {
            kept: true,
            ..kind("penalties over 8,192 tokens", false, penalties)
        },
    ]
}

pub fn bench(counts: &[usize]) {
    let most = counts.iter().copied().max().unwrap_or(1);
    let limits = Limits {
        max_tokens: most,
        max_logit_rows: most,
        max_runs: 1,
        max_pages_per_run: 8,
        max_expert_rows: 8,
        page_tokens: 16,
    };
    let mut gpu = CudaBackend::new(limits.clone(), 0).unwrap();
    let mut cpu = CpuBackend::new(
        Limits {
            max_logit_rows: 1,
            ..limits
        },
        1,
        None,
    )
    .unwrap();
    // The CPU's scratch is as wide as the widest weight.
    let widest = conclave_kernels::weight::HostLinear {
        out_features: VOCAB,
        in_features: 32,
        data: conclave_kernels::weight::HostWeight::Bf16(std::sync::Arc::new(vec![0u8; VOCAB * 64])),
    };
    cpu.upload_linear(&widest).unwrap();
    let bandwidth = gpu.read_bandwidth(4 << 30, 8).unwrap();
    println!("read bandwidth    {:.3} TB/s (measured now)", bandwidth / 1e12);
    let mut state = 1u64;
    let mut random = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    // As a model's: a normal spread of 3.
    let row: Vec<f32> = (0..VOCAB)
        .map(|_| ((0..12).map(|_| random()).sum::<f32>() - 6.0) * 3.0)
        .collect();
    let bytes: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
    let logits = gpu.alloc(most * bytes.len(), "logits").unwrap();
    for i in 0..most {
        gpu.write(&logits, i * bytes.len(), &bytes).unwrap();
    }
    let tokens: Vec<u32> = (0..HISTORY).map(|i| (i * i % VOCAB) as u32).collect();
    let mask: Vec<u8> = (0..VOCAB / 8)
        .map(|i| if i % 3 == 0 { 0x55 } else { 0 })
        .collect();
    println!("kind                              rows   kernels us   floor us   step us   by the host us");
    let mut sequences = 0;
    for kind in kinds() {
        for &count in counts {
            sequences += count as u64;
            let how: Vec<SampleRow<'_>> = (0..count)
                .map(|i| SampleRow {
                    params: &kind.params,
                    position: i as u32,
                    tokens: &tokens,
                    output_start: HISTORY / 2,
                    history: kind.kept.then(|| sequences + i as u64),
                    mask: kind.mask.then_some(&mask[..]),
                    forbidden: &[],
                })
                .collect();
            let queue = |gpu: &mut CudaBackend| assert!(gpu.queue_sample(&logits, VOCAB, &how).unwrap());
            for _ in 0..3 {
                queue(&mut gpu);
                gpu.sampled().unwrap();
            }
            gpu.time_kernels();
            for _ in 0..10 {
                queue(&mut gpu);
                gpu.sampled().unwrap();
            }
            let kernels: f64 = gpu.take_times().unwrap().iter().map(|(_, s)| s).sum::<f64>() / 10.0;
            let start = Instant::now();
            for _ in 0..STEPS {
                queue(&mut gpu);
                gpu.sampled().unwrap();
            }
            let step = start.elapsed().as_secs_f64() / STEPS as f64;
            let host = by_host(&mut gpu, &mut cpu, &logits, &how[..count.min(8)]) * count as f64
                / count.min(8) as f64;
            let floor = (count * VOCAB * 4) as f64 / bandwidth;
            println!(
                "{:32} {count:5}   {:10.1}   {:8.2}   {:7.1}   {:14.0}",
                kind.name,
                kernels * 1e6,
                floor * 1e6,
                step * 1e6,
                host * 1e6
            );
        }
    }
}

/// One row after the other copied here and sampled here.
fn by_host(gpu: &mut CudaBackend, cpu: &mut CpuBackend, logits: &Buffer, how: &[SampleRow<'_>]) -> f64 {
    let mut bytes = vec![0; VOCAB * 4];
    let there = cpu.alloc(bytes.len(), "logits").unwrap();
    let mut best = f64::INFINITY;
    for _ in 0..2 {
        let start = Instant::now();
        for (i, row) in how.iter().enumerate() {
            gpu.read(logits, i * bytes.len(), &mut bytes).unwrap();
            cpu.write(&there, 0, &bytes).unwrap();
            cpu.sample(&there, VOCAB, 0, std::slice::from_ref(row)).unwrap();
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}
