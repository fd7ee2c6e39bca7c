//! Random weights and batches, the same for both backends.

use std::sync::Arc;

use conclave_kernels::backend::{Backend, Batch, BatchRun, Buffer, HostExpert, Limits};
use conclave_kernels::weight::{Bytes, HostInt4, HostLinear, HostWeight};

pub const PAGE_TOKENS: usize = 16;

/// Numbers of a seed.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        conclave_plan::random::next(&mut self.0)
    }

    /// Uniform in [-1, 1).
    pub fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    pub fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.unit() * scale).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    F32,
    Bf16,
    F16,
    Fp8,
    /// Group, zero points present.
    Int4(usize, bool),
}

fn shared(bytes: Vec<u8>) -> Bytes {
    Arc::new(bytes)
}

pub fn linear(random: &mut Random, outputs: usize, inputs: usize, kind: Kind) -> HostLinear {
    let scale = 1.7 / (inputs as f32).sqrt();
    let n = outputs * inputs;
    let data = match kind {
        Kind::F32 => HostWeight::F32(shared(
            random
                .values(n, scale)
                .iter()
                .flat_map(|x| x.to_le_bytes())
                .collect(),
        )),
        Kind::Bf16 => {
            let values = random.values(n, scale);
            HostWeight::Bf16(shared(
                values
                    .iter()
                    .flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())
                    .collect(),
            ))
        }
        Kind::F16 => {
            let values = random.values(n, scale);
            HostWeight::F16(shared(
                values
                    .iter()
                    .flat_map(|x| half::f16::from_f32(*x).to_le_bytes())
                    .collect(),
            ))
        }
        Kind::Fp8 => {
            // Every finite byte, subnormals and both zeros included.
            let byte = |random: &mut Random| loop {
                let b = random.bits() as u8;
                if b & 0x7f != 0x7f {
                    return b;
                }
            };
            let data = (0..n).map(|_| byte(random)).collect();
            let blocks = outputs.div_ceil(128) * inputs.div_ceil(128);
            let scales = (0..blocks)
                .map(|_| scale / 200.0 * (1.0 + 0.5 * random.unit()))
                .collect();
            HostWeight::Fp8Block {
                data: shared(data),
                scales,
            }
        }
        Kind::Int4(group, zeros) => {
            let groups = outputs * inputs / group;
            let scales = (0..groups)
                .map(|_| half::f16::from_f32(scale / 5.0 * (1.0 + 0.5 * random.unit())).to_f32())
                .collect();
            let zeros = zeros.then(|| (0..groups).map(|_| random.below(17) as u8).collect());
            let packed = (0..n / 2).map(|_| random.bits() as u8).collect();
            HostWeight::Int4(HostInt4 {
                packed: shared(packed),
                scales,
                zeros,
                group,
            })
        }
    };
    HostLinear {
        out_features: outputs,
        in_features: inputs,
        data,
    }
}

pub fn expert(random: &mut Random, hidden: usize, inter: usize, kind: Kind) -> HostExpert {
    HostExpert {
        gate: linear(random, inter, hidden, kind),
        up: linear(random, inter, hidden, kind),
        down: linear(random, hidden, inter, kind),
    }
}

pub fn limits(tokens: usize, runs: usize, pages: usize) -> Limits {
    Limits {
        max_tokens: tokens,
        max_logit_rows: tokens,
        max_runs: runs,
        max_pages_per_run: pages,
        max_expert_rows: tokens * 8,
        page_tokens: PAGE_TOKENS,
    }
}

/// Runs of (position, length) with shuffled pages out of `pages`; no page twice.
pub fn batch(random: &mut Random, runs: &[(usize, usize)], pages: usize, vocab: usize) -> Batch {
    let mut free: Vec<u32> = (0..pages as u32).collect();
    let mut batch = Batch::default();
    for &(position, len) in runs {
        let first = batch.ids.len() as u32;
        let needed = (position + len).div_ceil(PAGE_TOKENS);
        let table = (0..needed)
            .map(|_| free.swap_remove(random.below(free.len())))
            .collect();
        batch.ids.extend((0..len).map(|_| random.below(vocab) as u32));
        batch.positions.extend((position as u32..).take(len));
        batch.runs.push(BatchRun {
            first,
            len: len as u32,
            pages: table,
            position: position as u32,
        });
    }
    batch.logit_rows = (0..batch.ids.len() as u32).collect();
    batch
}

pub fn upload(backend: &mut dyn Backend, values: &[f32]) -> Buffer {
    let buffer = backend.alloc(values.len() * 4, "input").unwrap();
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    backend.write(&buffer, 0, &bytes).unwrap();
    buffer
}

/// A buffer that holds only NaN.
pub fn poisoned(backend: &mut dyn Backend, words: usize) -> Buffer {
    let buffer = backend.alloc(words * 4, "output").unwrap();
    backend.write(&buffer, 0, &vec![0xff; words * 4]).unwrap();
    buffer
}

pub fn download(backend: &mut dyn Backend, buffer: &Buffer, words: usize) -> Vec<f32> {
    let mut bytes = vec![0; words * 4];
    backend.read(buffer, 0, &mut bytes).unwrap();
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}
