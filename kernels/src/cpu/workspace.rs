//! Scratch of the CPU backend. Grows while weights are uploaded and caches allocated, never inside an op.
//!
//! Keeps invariant K2 of ARCHITECTURE.md.

use crate::backend::{Limits, Result};
use crate::cpu::engine::Engine;
use crate::cpu::kv::KvCache;
use crate::cpu::memory::Memory;
use crate::cpu::weights::CpuLinear;
use crate::ops::experts::{CHUNK_ROWS, CpuExperts, Sorted};
use crate::ops::linear::Packed;
use crate::ops::route::{MAX_EXPERTS, ROUTE_TOKENS};
use crate::ops::{attention, linear, sample};
use crate::simd::LANES;

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
    /// Theta's bits and rotary_dim of `angles`; `None` when a step begins.
    pub(crate) angles_of: Option<(u64, usize)>,
    /// Router scores, `[ROUTE_TOKENS, experts]`.
    pub(crate) scores: Memory,
    /// Inputs of a linear.
    pub(crate) packed: Packed,
    packed_shape: (usize, usize),
    /// Hidden layer of the experts, `[CHUNK_ROWS, intermediate]`.
    pub(crate) hidden: Packed,
    hidden_width: usize,
    pub(crate) sorted: Sorted,
    widest: usize,
    longest: usize,
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
            angles_of: None,
            scores: Memory::words(ROUTE_TOKENS * MAX_EXPERTS, "router scores")?,
            packed: Packed::new(0, 0)?,
            packed_shape: (0, 0),
            hidden: Packed::new(0, 0)?,
            hidden_width: 0,
            sorted: Sorted::default(),
            widest: 0,
            longest: 0,
        })
    }

    /// Most rows of `experts`.
    pub(crate) fn max_expert_rows(&self) -> usize {
        self.limits.max_expert_rows
    }

    /// Most outputs of any weight, which bounds the vocabulary.
    pub(crate) fn max_out_features(&self) -> usize {
        self.widest
    }

    /// Makes room for ops with this weight.
    pub(crate) fn reserve_linear(&mut self, engine: &mut Engine, weight: &CpuLinear) -> Result<()> {
        let rows = self.limits.max_tokens.max(self.limits.max_logit_rows);
        grow(&mut self.normed, rows.saturating_mul(weight.in_features))?;
        self.reserve_packed(engine, rows, weight.in_features)?;
        if weight.out_features > self.widest {
            self.widest = weight.out_features;
            engine.each_scratch(|scratch| {
                scratch.sample = sample::Scratch::new(weight.out_features);
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Makes room for `experts` on a layer like this.
    pub(crate) fn reserve_experts(&mut self, engine: &mut Engine, experts: &CpuExperts) -> Result<()> {
        let rows = self.limits.max_expert_rows.min(CHUNK_ROWS);
        self.reserve_packed(engine, rows, experts.hidden)?;
        self.reserve_packed(engine, 0, experts.intermediate)?;
        if experts.intermediate > self.hidden_width {
            self.hidden = self.hidden.resized(rows, experts.intermediate)?;
            self.hidden_width = experts.intermediate;
        }
        self.sorted.reserve(rows, experts.experts.len());
        Ok(())
    }

    /// Makes room for attention with this cache.
    pub(crate) fn reserve_kv(&mut self, engine: &mut Engine, cache: &KvCache) -> Result<()> {
        let width = cache.kv_heads.saturating_mul(cache.head_dim);
        grow(&mut self.keys, self.limits.max_tokens.saturating_mul(width))?;
        grow(&mut self.values, self.limits.max_tokens.saturating_mul(width))?;
        grow(
            &mut self.angles,
            self.limits.max_tokens.saturating_mul(cache.head_dim),
        )?;
        let vectors = cache.head_dim.min(attention::MAX_HEAD_DIM).next_multiple_of(64) / LANES;
        engine.each_scratch(|scratch| {
            if !scratch.attention.fits(vectors) {
                scratch.attention = attention::Scratch::new(vectors)?;
            }
            Ok(())
        })
    }

    fn reserve_packed(&mut self, engine: &mut Engine, rows: usize, columns: usize) -> Result<()> {
        let (old_rows, old_columns) = self.packed_shape;
        if rows > old_rows || columns > old_columns {
            self.packed_shape = (rows.max(old_rows), columns.max(old_columns));
            self.packed = self.packed.resized(self.packed_shape.0, self.packed_shape.1)?;
        }
        if columns > self.longest {
            self.longest = columns;
            engine.each_scratch(|scratch| {
                scratch.linear = linear::Scratch::new(columns)?;
                Ok(())
            })?;
        }
        Ok(())
    }
}

fn grow(memory: &mut Memory, words: usize) -> Result<()> {
    if memory.len() / 4 < words {
        *memory = Memory::words(words, "workspace")?;
    }
    Ok(())
}
