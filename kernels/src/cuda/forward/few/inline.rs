//! One layer of up to four decode tokens, in six kernels: each does norm, choice of experts and sum itself.

use super::{Piece, Stream};
use crate::backend::Result;
use crate::cuda::forward::{Layer, cache};
use crate::ops::attention::cuda::{self as attention, AttentionParams};
use crate::ops::experts::cuda::{self as experts, ExpertParams};
use crate::ops::linear::cuda::{INLINE_TOKENS, Input, LinearCall, linear};
use crate::ops::route::cuda::{GATE_PARTS, RouteParams};

impl Piece<'_> {
    /// One layer of up to four decode tokens. Every kernel does the norm it needs itself.
    pub(super) fn inline_layer(&self, index: usize, layer: &Layer, stream: Stream) -> Result<Stream> {
        const OP: &str = "forward";
        let (backend, forward, gpu, tokens) = (self.backend, self.forward, self.gpu, self.tokens);
        let (sizes, places) = (&forward.sizes, &forward.places);
        let weights = &layer.handles.attention;
        // Two copies of the residual stream and two pairs of halves: no kernel writes what another block still reads.
        let at = |piece: usize| places.halves + (piece * 2 * INLINE_TOKENS * sizes.hidden * 4) as u64;
        let (before, attended, middle, after) = (at(0), at(1), at(2), at(3));
        let halves = |x0: u64| Stream {
            x0,
            x1: x0 + (tokens * sizes.hidden * 4) as u64,
            more: 1,
        };

        let projections = [weights.q, weights.k, weights.v].map(|id| backend.linear(OP, id));
        let [q, k, v] = projections;
        let input = Input::Norm(forward.norm_input(stream, tokens, layer.norm, before));
        let (y, squares) = (places.projection, places.squares);
        linear(
            gpu,
            &LinearCall {
                weights: &[q?, k?, v?],
                input,
                tokens,
                parts: 1,
                y,
                residual: 0,
                squares,
            },
        )?;

        let params = AttentionParams {
            qkv: places.projection,
            squares: if layer.q_norm == 0 { 0 } else { squares },
            q_norm: layer.q_norm,
            k_norm: layer.k_norm,
            leave_splits: 1,
            ..layer.attention.at(&backend.step, self.first)
        };
        let cache = cache(backend, layer);
        attention::decode(gpu, cache, &params)?;

        let output = [backend.linear(OP, weights.o)?];
        let input = Input::Splits(attention::split_input(&params, &backend.step, cache));
        let call = LinearCall {
            weights: &output,
            input,
            tokens,
            parts: 2,
            y: attended,
            residual: before,
            squares: 0,
        };
        linear(gpu, &call)?;
        let stream = halves(attended);

        let gate = [backend.linear(OP, layer.handles.gate)?];
        let input = Input::Norm(forward.norm_input(stream, tokens, layer.moe_norm, middle));
        let (parts, y) = (GATE_PARTS, places.gate_logits);
        linear(
            gpu,
            &LinearCall {
                weights: &gate,
                input,
                tokens,
                parts,
                y,
                residual: 0,
                squares: 0,
            },
        )?;
        backend.watch_gate(index, (tokens, sizes.experts), parts)?;

        let params = ExpertParams {
            experts: layer.experts,
            acted: places.acted,
            input: forward.norm_input(stream, tokens, layer.moe_norm, 0),
            route: RouteParams {
                tokens: tokens as i32,
                ..layer.route
            },
            residual: middle,
            halves: after,
            ..ExpertParams::default()
        };
        experts::gate_up_inline(gpu, layer.format, &params)?;
        experts::down_sum(
            gpu,
            layer.format,
            &ExpertParams {
                x: places.acted,
                ..params
            },
        )?;
        Ok(halves(after))
    }
}
