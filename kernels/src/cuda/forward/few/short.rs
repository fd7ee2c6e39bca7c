//! The attention half of a layer of 9 to 16 decode tokens, in four kernels: the products leave whole results with the sums of their squares,
//! from which attention makes its queries and keys, and the gate its norm.

use super::{Piece, Wanted};
use crate::backend::Result;
use crate::cuda::forward::{Layer, cache};
use crate::ops::attention::cuda::{self as attention, AttentionParams};
use crate::ops::linear::cuda::{Input, LinearCall, linear};
use crate::ops::linear::tall::{TallCall, linear_tall};
use crate::ops::rmsnorm::cuda::NormInput;

impl Piece<'_> {
    /// One layer: `plane` holds the norm of the residual stream in `hidden`; afterwards that of the next layer.
    pub(super) fn short_layer(&self, index: usize, layer: &Layer, next: Option<Wanted>) -> Result<()> {
        const OP: &str = "forward";
        let (backend, forward, gpu, tokens) = (self.backend, self.forward, self.gpu, self.tokens);
        let (sizes, places) = (&forward.sizes, &forward.places);
        let weights = &layer.handles.attention;

        let projections = [weights.q, weights.k, weights.v].map(|id| backend.linear(OP, id));
        let [q, k, v] = projections;
        let call = TallCall {
            weights: &[q?, k?, v?],
            plane: places.plane,
            tokens,
            y: places.projection,
            residual: 0,
            squares: places.squares,
        };
        linear_tall(gpu, &call)?;
        let params = AttentionParams {
            qkv: places.projection,
            squares: if layer.q_norm == 0 { 0 } else { places.squares },
            q_norm: layer.q_norm,
            k_norm: layer.k_norm,
            plane: places.attended_plane,
            plane_blocks: self.plane_blocks() as i32,
            ..layer.attention
        };
        attention::decode(gpu, cache(backend, layer), &params)?;

        let call = TallCall {
            weights: &[backend.linear(OP, weights.o)?],
            plane: places.attended_plane,
            tokens,
            y: self.hidden(),
            residual: self.hidden(),
            squares: places.squares,
        };
        linear_tall(gpu, &call)?;
        let gate = [backend.linear(OP, layer.handles.gate)?];
        let parts = self.gate_parts(gate[0]);
        let norm = NormInput {
            x0: self.hidden(),
            weight: layer.moe_norm,
            sum_out: places.normed,
            eps: sizes.eps,
            k: sizes.hidden as i32,
            ..NormInput::default()
        };
        let call = LinearCall {
            weights: &gate,
            input: Input::Squared(norm, places.squares),
            tokens,
            parts,
            y: places.gate_logits,
            residual: 0,
            squares: 0,
        };
        linear(gpu, &call)?;
        self.chosen_experts(index, layer, parts, next)
    }
}
