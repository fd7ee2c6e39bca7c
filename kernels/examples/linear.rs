//! Times one linear in every format: `cargo run --release -p conclave-kernels --example linear -- [threads] [tokens]
//! [out] [in] [copies] [isa]`. Many copies are read from memory, one from the cache.

use std::time::{Duration, Instant};

use conclave_kernels::backend::{Backend, Batch, BatchRun, Limits};
use conclave_kernels::cpu::{CpuBackend, Isa};
use conclave_kernels::dummy::{self, DummyFormat};

const FORMATS: [DummyFormat; 6] = [
    DummyFormat::F32,
    DummyFormat::F16,
    DummyFormat::Bf16,
    DummyFormat::Fp8Block,
    DummyFormat::Int4 { group: 128 },
    DummyFormat::Int4 { group: 32 },
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: usize| arguments.get(i).map_or(Ok(default), |text| text.parse());
    let (threads, tokens) = (number(0, 1)?, number(1, 1)?);
    let (out, input, copies) = (number(2, 2048)?, number(3, 1024)?, number(4, 100)?);
    let name = arguments.get(5).map_or(Isa::detect().name(), String::as_str);
    let isa = Isa::ALL
        .into_iter()
        .find(|isa| isa.name() == name)
        .ok_or("isa: avx512, avx2 or portable")?;
    println!(
        "{} {threads} threads, {tokens} x [{input}, {out}], {copies} copies",
        isa.name()
    );
    for format in FORMATS {
        let limits = Limits {
            max_tokens: tokens,
            max_logit_rows: 1,
            max_runs: 1,
            max_pages_per_run: 1,
            max_expert_rows: 1,
            page_tokens: tokens,
        };
        let mut backend = CpuBackend::new(limits, threads, Some(isa))?;
        let mut bytes = 0;
        let mut weights = Vec::new();
        for copy in 0..copies {
            let weight = dummy::linear(format, out, input, copy as u64, threads)?;
            bytes = weight.bytes();
            weights.push(backend.upload_linear(&weight)?);
        }
        let x = backend.alloc(tokens * input * 4, "x")?;
        let hidden = backend.alloc(tokens * out * 4, "hidden")?;
        let values: Vec<u8> = (0..tokens * input)
            .flat_map(|i| (i as f32).sin().to_le_bytes())
            .collect();
        backend.write(&x, 0, &values)?;
        backend.begin(&Batch {
            ids: vec![0; tokens],
            positions: (0..tokens as u32).collect(),
            runs: vec![BatchRun {
                first: 0,
                len: tokens as u32,
                pages: vec![0],
                position: 0,
            }],
            logit_rows: Vec::new(),
        })?;
        let (start, mut best) = (Instant::now(), f64::INFINITY);
        while start.elapsed() < Duration::from_secs(1) {
            let start = Instant::now();
            for weight in &weights {
                backend.linear_add(*weight, &x, &hidden)?;
            }
            best = best.min(start.elapsed().as_secs_f64() / copies as f64);
        }
        let flops = 2.0 * (tokens * out * input) as f64;
        println!(
            "{:<5} {:>9.1} us {:>6.1} GB/s {:>7.1} GFLOP/s",
            format.name(),
            best * 1e6,
            bytes as f64 / best / 1e9,
            flops / best / 1e9
        );
    }
    Ok(())
}
