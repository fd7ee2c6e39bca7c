//! Prints the op bench: `cargo run --release -p conclave-kernels --example ops -- [threads] [format,...] [tokens,...]`.

use conclave_kernels::bench::{Floors, Shape, bench_ops};
use conclave_kernels::cpu::Isa;
use conclave_kernels::dummy::DummyFormat;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let threads = arguments.first().map_or(Ok(2), |threads| threads.parse())?;
    let formats = arguments.get(1).map_or("bf16,fp8,int4", String::as_str);
    let tokens = arguments.get(2).map_or("1,8,512", String::as_str);
    let isa = Isa::detect();
    for format in formats.split(',') {
        let format = match format {
            "f32" => DummyFormat::F32,
            "f16" => DummyFormat::F16,
            "bf16" => DummyFormat::Bf16,
            "fp8" => DummyFormat::Fp8Block,
            "int4" => DummyFormat::Int4 { group: 128 },
            "int4-g32" => DummyFormat::Int4 { group: 32 },
            other => {
                return Err(format!("format {other}: one of f32, f16, bf16, fp8, int4, int4-g32").into());
            }
        };
        for tokens in tokens.split(',') {
            let floors = Floors::measure(threads, isa)?;
            println!(
                "{} {threads} threads: read {:.1} GB/s, multiply-add {:.0} GFLOP/s",
                isa.name(),
                floors.read / 1e9,
                floors.flops / 1e9
            );
            for row in bench_ops(&Shape::default(), format, tokens.parse()?, threads, isa, &floors)? {
                println!("{row}");
            }
        }
    }
    Ok(())
}
