//! Invariant K1 over a whole model: logits are the same to the bit for every instruction set, number of threads and
//! cut of the prompt into steps.
//!
//! Proves invariant K1 of ARCHITECTURE.md.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]

mod common;

use std::path::Path;

use common::{Model, limits};
use conclave_kernels::backend::KvDtype;
use conclave_kernels::cpu::{CpuBackend, Isa};

fn load(folder: &str, threads: usize, isa: Isa, kv: KvDtype) -> Model {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data/minimax-m2")
        .join(folder);
    let backend = CpuBackend::new(limits(), threads, Some(isa)).unwrap();
    Model::load(&dir, Box::new(backend), kv)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn logits_are_the_same_however_they_are_computed() {
    for folder in ["tiny-hd64/bf16", "tiny-hd64/fp8", "tiny-hd64/ct-int4"] {
        for kv in [KvDtype::Bf16, KvDtype::Fp8E4m3] {
            let ids: Vec<u32> = (0..150).map(|i| (i * i * 31 + 7) % 384).collect();
            let expected = load(folder, 1, Isa::detect(), kv).step(&ids, 0);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
                // Plain Rust is slow: one cut, one number of threads and the first tokens are enough of it.
                let portable = isa == Isa::Portable;
                let chunks = if portable { &[17][..] } else { &[1, 5, 64, 67, 150] };
                let threads = if portable { &[3][..] } else { &[1, 2, 3] };
                let ids = if portable { &ids[..40] } else { &ids[..] };
                let expected = &expected.logits[..expected.logits.len() / 150 * ids.len()];
                for (chunk, threads) in chunks.iter().flat_map(|c| threads.iter().map(move |t| (*c, *t))) {
                    let mut model = load(folder, threads, isa, kv);
                    let mut logits = Vec::new();
                    for (i, ids) in ids.chunks(chunk).enumerate() {
                        logits.extend(model.step(ids, i * chunk).logits);
                    }
                    let same = bits(&logits) == bits(expected);
                    assert!(
                        same,
                        "{folder} {kv:?} {isa:?}, {threads} threads, in steps of {chunk}"
                    );
                }
            }
        }
    }
}
