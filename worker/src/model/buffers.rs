//! The activations of a step, allocated once.

use conclave_kernels::backend::{Backend, Buffer, Limits, Result};
use conclave_plan::model::ModelSpec;

/// Shapes in values; all F32 but `ids`.
#[derive(Debug)]
pub(super) struct Buffers {
    /// `[max_tokens, hidden]`: the residual stream.
    pub(super) hidden: Buffer,
    /// `[max_tokens, widest query projection]`.
    pub(super) q: Buffer,
    pub(super) attention: Buffer,
    /// `[max_tokens, hidden]`: what goes to the experts.
    pub(super) normed: Buffer,
    /// U32 `[max_tokens, top_k]`.
    pub(super) ids: Buffer,
    /// `[max_tokens, top_k]`.
    pub(super) weights: Buffer,
    /// `[max_tokens, hidden]`: rows of other ranks.
    pub(super) staging: Buffer,
    /// `[max_tokens * top_k, hidden]`: results for other ranks.
    pub(super) staged_out: Buffer,
    /// `[max_tokens * top_k, hidden]`: results for this rank's tokens.
    pub(super) y: Buffer,
    /// `[max_logit_rows, vocab]`.
    pub(super) logits: Buffer,
    /// `[max_tokens, experts]`, only for a tap.
    pub(super) router_logits: Option<Buffer>,
}

/// Bytes that `Buffers::new` allocates.
pub fn workspace_bytes(spec: &ModelSpec, limits: &Limits) -> u64 {
    let sizes = Sizes::new(spec, limits);
    let tokens = [
        sizes.hidden,
        sizes.q,
        sizes.q,
        sizes.hidden,
        sizes.ids,
        sizes.ids,
        sizes.hidden,
    ];
    (tokens.iter().sum::<usize>() + 2 * sizes.pairs + sizes.logits) as u64
}

/// In bytes. The factors are bounded by the limits of `plan`, so that the products fit.
struct Sizes {
    hidden: usize,
    q: usize,
    ids: usize,
    pairs: usize,
    logits: usize,
    router: usize,
}

impl Sizes {
    fn new(spec: &ModelSpec, limits: &Limits) -> Sizes {
        let tokens = limits.max_tokens * 4;
        let widest =
            |of: fn(&conclave_plan::model::LayerSpec) -> usize| spec.layers.iter().map(of).max().unwrap_or(0);
        let top_k = widest(|layer| layer.moe.top_k);
        Sizes {
            hidden: tokens * spec.hidden,
            q: tokens * widest(|layer| layer.attention.q_width()),
            ids: tokens * top_k,
            pairs: tokens * top_k * spec.hidden,
            logits: limits.max_logit_rows * spec.vocab * 4,
            router: tokens * widest(|layer| layer.moe.experts),
        }
    }
}

impl Buffers {
    pub(super) fn new(backend: &mut dyn Backend, spec: &ModelSpec, limits: &Limits) -> Result<Buffers> {
        let sizes = Sizes::new(spec, limits);
        Ok(Buffers {
            hidden: backend.alloc(sizes.hidden, "hidden states")?,
            q: backend.alloc(sizes.q, "queries")?,
            attention: backend.alloc(sizes.q, "attention output")?,
            normed: backend.alloc(sizes.hidden, "expert input")?,
            ids: backend.alloc(sizes.ids, "chosen experts")?,
            weights: backend.alloc(sizes.ids, "expert weights")?,
            staging: backend.alloc(sizes.hidden, "rows from other ranks")?,
            staged_out: backend.alloc(sizes.pairs, "expert output for other ranks")?,
            y: backend.alloc(sizes.pairs, "expert output")?,
            logits: backend.alloc(sizes.logits, "logits")?,
            router_logits: None,
        })
    }

    /// Router logits are only asked for when results are compared with a reference.
    pub(super) fn router_logits(
        &mut self,
        backend: &mut dyn Backend,
        spec: &ModelSpec,
        limits: &Limits,
    ) -> Result<()> {
        if self.router_logits.is_none() {
            let bytes = Sizes::new(spec, limits).router;
            self.router_logits = Some(backend.alloc(bytes, "router logits")?);
        }
        Ok(())
    }
}
