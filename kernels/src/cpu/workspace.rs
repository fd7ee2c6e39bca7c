//! Scratch of the CPU backend. Grows while weights are uploaded, never inside an op.

use crate::backend::{Limits, Result};
use crate::cpu::memory::Memory;
use crate::cpu::weights::CpuLinear;
use crate::ops::linear::Packed;
use crate::ops::route::MAX_EXPERTS;
use crate::ops::sample::Scratch;

/// Buffers that ops share, each as large as the largest weight asks for.
pub(crate) struct Workspace {
    limits: Limits,
    /// Normalised rows, `[tokens, in]`.
    pub(crate) normed: Memory,
    /// Keys and values of the step before they are rounded, `[tokens, kv width]` each.
    pub(crate) keys: Memory,
    pub(crate) values: Memory,
    /// Cosines and sines, `[tokens, rotary_dim]`.
    pub(crate) angles: Memory,
    /// Router scores of one token.
    pub(crate) scores: Memory,
    pub(crate) packed: Packed,
    /// Hidden layer of the experts.
    pub(crate) gate: Memory,
    pub(crate) up: Memory,
    pub(crate) sample: Scratch,
}

impl Workspace {
    pub(crate) fn new(limits: &Limits) -> Result<Workspace> {
        let empty = || Memory::words(0, "workspace");
        Ok(Workspace {
            limits: limits.clone(),
            normed: empty()?,
            keys: empty()?,
            values: empty()?,
            angles: empty()?,
            scores: Memory::words(MAX_EXPERTS, "router scores")?,
            packed: Packed::new(1, 1)?,
            gate: empty()?,
            up: empty()?,
            sample: Scratch::new(0),
        })
    }

    /// Makes room for ops with this weight.
    pub(crate) fn reserve_linear(&mut self, weight: &CpuLinear) -> Result<()> {
        let rows = self.limits.max_tokens.max(self.limits.max_logit_rows);
        grow(&mut self.normed, rows.saturating_mul(weight.in_features))?;
        if !self.packed.fits(1, weight.in_features) {
            self.packed = Packed::new(1, weight.in_features)?;
        }
        if self.sample.values.len() < weight.out_features {
            self.sample = Scratch::new(weight.out_features);
        }
        Ok(())
    }

    pub(crate) fn reserve_experts(&mut self, hidden: usize, intermediate: usize) -> Result<()> {
        grow(&mut self.gate, intermediate)?;
        grow(&mut self.up, intermediate)?;
        if !self.packed.fits(1, hidden.max(intermediate)) {
            self.packed = Packed::new(1, hidden.max(intermediate))?;
        }
        Ok(())
    }

    pub(crate) fn reserve_kv(&mut self, kv_heads: usize, head_dim: usize) -> Result<()> {
        let words = self.limits.max_tokens.saturating_mul(kv_heads * head_dim);
        grow(&mut self.keys, words)?;
        grow(&mut self.values, words)?;
        grow(&mut self.angles, self.limits.max_tokens.saturating_mul(head_dim))
    }
}

fn grow(memory: &mut Memory, words: usize) -> Result<()> {
    if memory.len() / 4 < words {
        *memory = Memory::words(words, "workspace")?;
    }
    Ok(())
}
