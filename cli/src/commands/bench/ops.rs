//! `--ops`: a step's ops on this CPU, beside the read bandwidth and the multiply-add peak of the same threads.

use anyhow::{Result, bail};
use conclave_kernels::bench::{Floors, Shape, bench_ops};
use conclave_kernels::cpu::Isa;
use conclave_kernels::dummy::DummyFormat;

use crate::settings::BenchSettings;

pub fn run(settings: &BenchSettings) -> Result<()> {
    let (isa, threads) = (Isa::detect(), super::threads(settings));
    for format in &settings.formats {
        let format = parse(format)?;
        for &tokens in &settings.batch {
            let floors = Floors::measure(threads, isa)?;
            println!(
                "{} on {threads} threads: reads {:.1} GB/s, multiply-adds {:.0} GFLOP/s",
                isa.name(),
                floors.read / 1e9,
                floors.flops / 1e9
            );
            for row in bench_ops(&Shape::default(), format, tokens, threads, isa, &floors)? {
                println!("  {row}");
            }
        }
    }
    Ok(())
}

fn parse(format: &str) -> Result<DummyFormat> {
    Ok(match format {
        "f32" => DummyFormat::F32,
        "f16" => DummyFormat::F16,
        "bf16" => DummyFormat::Bf16,
        "fp8" => DummyFormat::Fp8Block,
        "int4" => DummyFormat::Int4 { group: 128 },
        "int4-g32" => DummyFormat::Int4 { group: 32 },
        other => bail!("formats holds {other:?}: known are f32, f16, bf16, fp8, int4, int4-g32"),
    })
}
