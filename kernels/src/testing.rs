//! What the tests of all ops share: a generator, backends of every kind, poisoned outputs, comparisons.

use crate::backend::{Backend, Batch, BatchRun, Buffer, Limits};
use crate::cpu::{CpuBackend, Isa};

/// A small generator of its own seed.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        conclave_plan::random::next(&mut self.0)
    }

    /// Below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.bits() % end as u64) as usize
    }

    /// In -1..1, many of them small.
    pub(crate) fn f32(&mut self) -> f32 {
        let unit = (self.bits() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        if self.bits().is_multiple_of(4) {
            unit * 1e-3
        } else {
            unit
        }
    }

    pub(crate) fn vec(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.f32()).collect()
    }
}

/// Limits that every test keeps to.
pub(crate) fn limits() -> Limits {
    Limits {
        max_tokens: 320,
        max_logit_rows: 64,
        max_runs: 32,
        max_pages_per_run: 320,
        max_expert_rows: 3000,
        page_tokens: 16,
    }
}

/// A backend of every instruction set of this machine, with one thread and with three; plain Rust, which is slow, with
/// three only.
pub(crate) fn backends(limits: &Limits) -> Vec<CpuBackend> {
    let available = Isa::ALL.into_iter().filter(|isa| isa.is_available());
    let both = available.flat_map(|isa| [(isa, 1), (isa, 3)]);
    both.filter(|kind| *kind != (Isa::Portable, 1))
        .map(|(isa, threads)| CpuBackend::new(limits.clone(), threads, Some(isa)).unwrap())
        .collect()
}

/// A buffer with these values.
pub(crate) fn upload(backend: &mut CpuBackend, values: &[f32]) -> Buffer {
    let buffer = backend.alloc(values.len() * 4, "test").unwrap();
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    backend.write(&buffer, 0, &bytes).unwrap();
    buffer
}

/// A buffer of NaNs.
pub(crate) fn poisoned(backend: &mut CpuBackend, len: usize) -> Buffer {
    upload(backend, &vec![f32::NAN; len])
}

/// The first `len` values of a buffer.
pub(crate) fn download(backend: &mut CpuBackend, buffer: &Buffer, len: usize) -> Vec<f32> {
    let mut bytes = vec![0; len * 4];
    backend.read(buffer, 0, &mut bytes).unwrap();
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|bytes| f32::from_le_bytes(*bytes))
        .collect()
}

/// `tokens` sequences of one token each, at position 0 of a page of their own.
pub(crate) fn begin_tokens(backend: &mut CpuBackend, tokens: usize) {
    let run = |t: usize| BatchRun {
        first: t as u32,
        len: 1,
        pages: vec![t as u32],
        position: 0,
    };
    let batch = Batch {
        ids: vec![0; tokens],
        positions: vec![0; tokens],
        runs: if tokens <= limits().max_runs {
            (0..tokens).map(run).collect()
        } else {
            vec![BatchRun {
                first: 0,
                len: tokens as u32,
                pages: (0..tokens.div_ceil(16) as u32).collect(),
                position: 0,
            }]
        },
        logit_rows: Vec::new(),
    };
    let positions: Vec<u32> = if batch.runs.len() == tokens {
        vec![0; tokens]
    } else {
        (0..tokens as u32).collect()
    };
    backend.begin(&Batch { positions, ..batch }).unwrap();
}

/// Bits, so that a difference shows where.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Fails unless `|found - expected| <= bound` everywhere; `bounds` are absolute, one per value.
pub(crate) fn assert_close(what: &str, found: &[f32], expected: &[f64], bounds: &[f64]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, ((found, expected), bound)) in found.iter().zip(expected).zip(bounds).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(
            error <= *bound,
            "{what}: value {i} is {found}, expected {expected} within {bound:e}"
        );
    }
}
