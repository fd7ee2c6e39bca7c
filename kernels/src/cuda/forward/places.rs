//! What all layers of a step share: their sizes, and where activations lie in the workspace.

use conclave_plan::model::{LayerSpec, ModelSpec, QkNorm, Scoring};

use super::{ATTENTION_CHUNK, EXPERTS_CHUNK, few, many};
use crate::backend::Result;
use crate::cuda::CudaBackend;
use crate::cuda::exchange::group::HALF_TOKENS;
use crate::cuda::format::padded;
use crate::cuda::plane::{plane_blocks, plane_bytes, quantised_bytes};
use crate::cuda::step::FEW_TOKENS;
use crate::cuda::workspace::Slot;
use crate::ops::attention::cuda::PrefillPlans;
use crate::ops::experts::cuda::HALF_SLOTS;
use crate::ops::experts::many::{SortArea, sorted_rows};
use crate::ops::linear::cuda::{INLINE_TOKENS, INLINE_WIDTH};
use crate::ops::route::cuda::Groups;

/// Sizes that all layers share.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub(super) hidden: usize,
    pub(super) heads: usize,
    pub(super) q_width: usize,
    pub(super) kv_width: usize,
    pub(super) inter: usize,
    pub(super) experts: usize,
    pub(super) top_k: usize,
    pub(super) vocab: usize,
    pub(super) eps: f32,
    pub(super) rotary: usize,
}

/// Where things lie.
#[derive(Clone, Copy)]
pub(super) struct Places {
    pub(super) normed: u64,
    pub(super) acted: u64,
    pub(super) projection: u64,
    pub(super) squares: u64,
    pub(super) gate_logits: u64,
    pub(super) groups: Groups,
    pub(super) route_arrived: u64,
    pub(super) hidden: u64,
    pub(super) halves: u64,
    pub(super) attended: u64,
    pub(super) queries: u64,
    pub(super) expert_out: u64,
    pub(super) ids: u64,
    pub(super) weights: u64,
    pub(super) turns: u64,
    pub(super) plane: u64,
    pub(super) attended_plane: u64,
    pub(super) sorted_plane: u64,
    pub(super) acted_plane: u64,
    /// 0 unless activations are quantised: of tokens (norm's or attention's result) and of sorted rows.
    pub(super) quantised_plane: u64,
    pub(super) quantised_sorted: u64,
    pub(super) sort: SortArea,
    /// Blocks of the planes of tokens and of sorted rows.
    pub(super) blocks: usize,
    pub(super) sorted_blocks: usize,
}

impl Sizes {
    pub(super) fn of(spec: &ModelSpec, layer: &LayerSpec) -> Sizes {
        Sizes {
            hidden: spec.hidden,
            heads: layer.attention.heads,
            q_width: layer.attention.q_width(),
            kv_width: layer.attention.kv_width(),
            inter: layer.moe.intermediate,
            experts: layer.moe.experts,
            top_k: layer.moe.top_k,
            vocab: spec.vocab,
            eps: spec.rms_eps,
            rotary: layer.attention.rotary_dim,
        }
    }

    /// Whether attention can make its queries and keys itself, from sums of squares of 32 values.
    pub(super) fn makes_queries(&self, layer: &LayerSpec) -> bool {
        layer.attention.qk_norm != QkNorm::PerHead
            && self.q_width.is_multiple_of(32)
            && self.kv_width.is_multiple_of(32)
    }

    /// Whether the kernels that do norm, choice and sum themselves serve such a layer.
    pub(super) fn inline(&self, layer: &LayerSpec) -> bool {
        let narrow = self.hidden <= INLINE_WIDTH && self.hidden.is_multiple_of(2);
        let sigmoid = layer.moe.scoring == Scoring::Sigmoid;
        sigmoid && self.makes_queries(layer) && narrow && self.top_k <= 2 * HALF_SLOTS
    }
}

impl CudaBackend {
    /// Sizes the whole workspace, so that no step allocates.
    pub(super) fn places(&mut self, sizes: &Sizes, turns: u64) -> Result<Places> {
        let limit = self.limits.max_tokens;
        let few = FEW_TOKENS.min(limit.max(INLINE_TOKENS));
        let mut pairs = few * sizes.top_k;
        let width = sizes.q_width + 2 * sizes.kv_width;
        let many = if limit > FEW_TOKENS { limit } else { 0 };
        let (chunk, experts_chunk) = (many.min(ATTENTION_CHUNK), many.min(EXPERTS_CHUNK));
        let blocks = plane_blocks(chunk.max(experts_chunk).max(few));
        let mut sorted_tokens = experts_chunk;
        if let Some(exchange) = self.exchange() {
            let shape = exchange.shape()?;
            pairs = pairs.max(shape.few_rows() * sizes.top_k);
            sorted_tokens = sorted_tokens.max(shape.many_rows());
        }
        let sorted = match sorted_tokens {
            0 => 0,
            tokens => sorted_rows(tokens * sizes.top_k, sizes.experts),
        };
        let (hidden, inter) = (padded(sizes.hidden), padded(sizes.inter));
        let fp8 = self.fp8_activations;
        let widest = hidden.max(padded(sizes.q_width));
        let mut get = |slot, bytes: usize| self.workspace.get(&self.gpu, slot, bytes);
        let per_kv = sizes.q_width / sizes.kv_width;
        let pieces = many.div_ceil(ATTENTION_CHUNK.min(HALF_TOKENS));
        get(
            Slot::PrefillBlocks,
            PrefillPlans::bytes(many, self.limits.max_runs, pieces, per_kv),
        )?;
        let groups = get(Slot::Groups, Groups::bytes(pairs, sizes.experts))?;
        let sort = get(Slot::Sort, SortArea::bytes(sorted_tokens, sizes.top_k))?;
        Ok(Places {
            normed: get(Slot::Normed, few * sizes.hidden * 4)?,
            acted: get(Slot::Acted, pairs * inter * 4)?,
            projection: get(
                Slot::Projection,
                few::parts_bytes(few, width).max(chunk * width * 4),
            )?,
            squares: get(Slot::Squares, few * width.max(sizes.hidden) / 32 * 4)?,
            gate_logits: get(
                Slot::GateLogits,
                few::parts_bytes(few, sizes.experts)
                    .max(many::GATE_PARTS * experts_chunk * sizes.experts * 4),
            )?,
            groups: Groups::at(groups, pairs, sizes.experts),
            route_arrived: get(Slot::RouteArrived, 4)?,
            hidden: get(Slot::Hidden, limit * sizes.hidden * 4)?,
            halves: get(
                Slot::Halves,
                few::parts_bytes(few.max(INLINE_TOKENS), sizes.hidden),
            )?,
            attended: get(Slot::Attended, few * sizes.q_width * 4)?,
            queries: get(
                Slot::Queries,
                (few.max(chunk) * 4).max(few * 4 + chunk * 2) * sizes.q_width,
            )?,
            expert_out: get(Slot::ExpertOut, pairs * sizes.hidden * 4)?,
            ids: get(Slot::ChosenIds, few.max(experts_chunk) * sizes.top_k * 4)?,
            weights: get(Slot::ChosenWeights, few.max(experts_chunk) * sizes.top_k * 4)?,
            turns,
            plane: get(Slot::Plane, plane_bytes(blocks, hidden))?,
            attended_plane: get(Slot::AttendedPlane, plane_bytes(blocks, padded(sizes.q_width)))?,
            sorted_plane: get(Slot::SortedPlane, plane_bytes(sorted / 8, hidden))?,
            acted_plane: get(Slot::ActedPlane, plane_bytes(sorted / 8, inter))?,
            quantised_plane: match fp8 {
                true => get(Slot::QuantisedPlane, quantised_bytes(blocks, widest))?,
                false => 0,
            },
            quantised_sorted: match fp8 && many > 0 {
                true => get(Slot::QuantisedSorted, quantised_bytes(sorted / 8, hidden))?,
                false => 0,
            },
            sort: SortArea::at(sort, sorted_tokens, sizes.top_k),
            blocks,
            sorted_blocks: sorted / 8,
        })
    }
}
