//! Random weights in any format, for benchmarks at full size without a checkpoint (`--load-format dummy`).
//!
//! Must stay true: the bytes are a function of format, shape and seed alone; no NaN and no infinity occurs; values
//! have about the variance 1 / in_features, so that activations keep their size from layer to layer.

use std::sync::Arc;

use crate::backend::Result;
use crate::cpu::memory::Memory;
use crate::simd::{Isa, Kernel, Simd, run};
use crate::weight::{HostInt4, HostLinear, HostWeight};

/// A storage format of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DummyFormat {
    F32,
    F16,
    Bf16,
    Fp8Block,
    /// Without zeros: all 8.
    Int4 {
        group: usize,
    },
}

impl DummyFormat {
    /// Name as tables print it.
    pub fn name(self) -> &'static str {
        match self {
            DummyFormat::F32 => "f32",
            DummyFormat::F16 => "f16",
            DummyFormat::Bf16 => "bf16",
            DummyFormat::Fp8Block => "fp8",
            DummyFormat::Int4 { .. } => "int4",
        }
    }

    /// Bytes of a weight as a host holds it, scales included (as F32).
    pub fn stored_bytes(self, out_features: usize, in_features: usize) -> u64 {
        let (out, input) = (out_features as u64, in_features as u64);
        match self {
            DummyFormat::F32 => 4 * out * input,
            DummyFormat::F16 | DummyFormat::Bf16 => 2 * out * input,
            DummyFormat::Fp8Block => out * input + 4 * out.div_ceil(128) * input.div_ceil(128),
            DummyFormat::Int4 { group } => out * input / 2 + 4 * out * input.div_ceil(group.max(1) as u64),
        }
    }
}

/// A random weight `[out_features, in_features]`, made by `threads` threads. `OutOfMemory` if it does not fit. INT4
/// wants an even `in_features`.
pub fn linear(
    format: DummyFormat,
    out_features: usize,
    in_features: usize,
    seed: u64,
    threads: usize,
) -> Result<HostLinear> {
    let values = out_features.saturating_mul(in_features);
    // Of values in ±[1, 2) * 2^exponent: variance 7/3 * 4^exponent.
    let exponent = (3.0 / (7.0 * in_features as f64))
        .sqrt()
        .log2()
        .round()
        .clamp(-14.0, 0.0) as i32;
    let random = |bytes: usize, and: u32, or: u32| -> Result<Arc<Memory>> {
        let mut memory = Memory::new(bytes, "dummy weights")?;
        fill(memory.bytes_mut(), seed, and, or, threads);
        Ok(Arc::new(memory))
    };
    // Signs and mantissas are random, exponents fixed, in both halves of a word where values are 16 bits wide.
    let data = match format {
        DummyFormat::F32 => {
            let bytes = random(
                values.saturating_mul(4),
                0x807f_ffff,
                ((exponent + 127) as u32) << 23,
            )?;
            HostWeight::F32(bytes)
        }
        DummyFormat::F16 => {
            let bytes = random(
                values.saturating_mul(2),
                0x83ff_83ff,
                0x0001_0001 * (((exponent + 15) as u32) << 10),
            )?;
            HostWeight::F16(bytes)
        }
        DummyFormat::Bf16 => {
            let bytes = random(
                values.saturating_mul(2),
                0x807f_807f,
                0x0001_0001 * (((exponent + 127) as u32) << 7),
            )?;
            HostWeight::Bf16(bytes)
        }
        DummyFormat::Fp8Block => {
            // Exponent codes 0 to 7 of 15: magnitudes up to 1.875, their variance 0.39, and no NaN.
            let data = random(values, 0xbfbf_bfbf, 0)?;
            let blocks = out_features.div_ceil(128) * in_features.div_ceil(128);
            let scale = (1.0 / (0.39 * in_features as f64)).sqrt() as f32;
            HostWeight::Fp8Block {
                data,
                scales: vec![scale; blocks],
            }
        }
        DummyFormat::Int4 { group } => {
            // q - 8 is uniform in -8..=7: variance 21.5.
            let scale = (1.0 / (21.5 * in_features as f64)).sqrt() as f32;
            HostWeight::Int4(HostInt4 {
                packed: random(values / 2, u32::MAX, 0)?,
                scales: vec![scale; out_features * in_features.div_ceil(group.max(1))],
                zeros: None,
                group,
            })
        }
    };
    Ok(HostLinear {
        out_features,
        in_features,
        data,
    })
}

/// Random words `hash(seed, index) & and | or`; a last, partial word gives its first bytes.
fn fill(bytes: &mut [u8], seed: u64, and: u32, or: u32, threads: usize) {
    let part = bytes.len().div_ceil(threads.max(1)).next_multiple_of(1 << 16);
    let isa = Isa::detect();
    std::thread::scope(|scope| {
        for (i, bytes) in bytes.chunks_mut(part).enumerate() {
            let first = (i * part / 4) as u64;
            scope.spawn(move || {
                run(
                    isa,
                    Fill {
                        bytes,
                        first,
                        seed,
                        and,
                        or,
                    },
                )
            });
        }
    });
}

struct Fill<'a> {
    bytes: &'a mut [u8],
    first: u64,
    seed: u64,
    and: u32,
    or: u32,
}

impl Kernel for Fill<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        // Blocks of 2^16 words share a key, so that within one all arithmetic is in 32 bits.
        for (i, block) in self.bytes.chunks_mut(4 << 16).enumerate() {
            let key = mix(self.seed ^ ((self.first >> 16) + i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let offset = self.first as u32 & 0xffff;
            let (words, rest) = block.as_chunks_mut::<4>();
            let count = words.len() as u32;
            for (word, i) in words.iter_mut().zip(0u32..) {
                *word = (hash(key, offset + i) & self.and | self.or).to_le_bytes();
            }
            let last = (hash(key, offset + count) & self.and | self.or).to_le_bytes();
            let length = rest.len();
            rest.copy_from_slice(&last[..length]);
        }
    }
}

/// The finaliser of SplitMix64.
fn mix(x: u64) -> u64 {
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// The finaliser of MurmurHash3 over a keyed counter.
#[inline(always)]
fn hash(key: u64, i: u32) -> u32 {
    let x = (i ^ key as u32)
        .wrapping_mul(0x9e37_79b1)
        .wrapping_add((key >> 32) as u32);
    let x = (x ^ x >> 16).wrapping_mul(0x85eb_ca6b);
    let x = (x ^ x >> 13).wrapping_mul(0xc2b2_ae35);
    x ^ x >> 16
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::weights::CpuLinear;
    use crate::ops::linear::dequantize_row;

    const FORMATS: [DummyFormat; 5] = [
        DummyFormat::F32,
        DummyFormat::F16,
        DummyFormat::Bf16,
        DummyFormat::Fp8Block,
        DummyFormat::Int4 { group: 32 },
    ];

    #[test]
    fn values_are_finite_and_of_variance_one_over_in() {
        for format in FORMATS {
            for columns in [96, 1000, 3072] {
                let weight = CpuLinear::new(&linear(format, 131, columns, 7, 2).unwrap()).unwrap();
                let mut sum = 0.0;
                let mut row = vec![f32::NAN; columns];
                for r in 0..131 {
                    dequantize_row(&weight, r, &mut row);
                    assert!(row.iter().all(|x| x.is_finite()), "{format:?}");
                    sum += row.iter().map(|x| f64::from(x * x)).sum::<f64>();
                }
                let variance = sum / 131.0;
                assert!((0.4..2.5).contains(&variance), "{format:?} {columns}: {variance}");
            }
        }
    }

    #[test]
    fn bytes_depend_on_the_seed_and_not_on_the_threads() {
        let bytes = |seed, threads| {
            let weight = linear(DummyFormat::Fp8Block, 300, 1001, seed, threads).unwrap();
            CpuLinear::new(&weight).unwrap().bytes().to_vec()
        };
        assert_eq!(bytes(1, 1), bytes(1, 3));
        assert_ne!(bytes(1, 1), bytes(2, 1));
        let codes = bytes(1, 1);
        let distinct: std::collections::HashSet<u8> = codes.iter().copied().collect();
        assert_eq!(distinct.len(), 128, "every allowed code occurs");
    }
}
