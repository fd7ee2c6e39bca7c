//! One layer of up to four decode tokens, in six kernels: each does norm, choice of experts and sum itself. With experts on other
//! ranks in eight: the exchange's first one makes norm and choice, its last one the sum.

use super::{Piece, Stream};
use crate::backend::Result;
use crate::cuda::exchange::{Choice, Exchange, FewResults};
use crate::cuda::forward::{Layer, cache};
use crate::ops::attention::cuda::{self as attention, AttentionParams};
use crate::ops::experts::cuda::{self as experts, ExpertParams};
use crate::ops::linear::cuda::{INLINE_TOKENS, Input, LinearCall, linear};
use crate::ops::rmsnorm::cuda::NormRows;
use crate::ops::route::cuda::{GATE_PARTS, RouteParams};

impl Piece<'_> {
    /// One layer of up to four decode tokens. Every kernel does the norm it needs itself.
    pub(super) fn inline_layer(&self, index: usize, layer: &Layer, stream: Stream) -> Result<Stream> {
        let (middle, after) = (self.inline_place(2), self.inline_place(3));
        let attended = self.inline_attention(layer, stream, self.inline_place(0))?;
        let route = self.inline_gate(index, layer, attended, middle)?;
        let params = ExpertParams {
            experts: layer.experts,
            acted: self.forward.places.acted,
            input: self.forward.norm_input(attended, self.tokens, layer.moe_norm, 0),
            route,
            residual: middle,
            halves: after,
            ..ExpertParams::default()
        };
        experts::gate_up_inline(self.gpu, layer.format, &params)?;
        experts::down_sum(
            self.gpu,
            layer.format,
            &ExpertParams {
                x: params.acted,
                ..params
            },
        )?;
        Ok(self.halves(after))
    }

    /// The same with experts on other ranks; the residual stream is in `hidden`.
    pub(super) fn inline_exchanged_layer(
        &self,
        index: usize,
        layer: &Layer,
        exchange: &dyn Exchange,
    ) -> Result<()> {
        let middle = self.inline_place(2);
        let stream = Stream {
            x0: self.hidden(),
            x1: 0,
            more: 0,
        };
        let attended = self.inline_attention(layer, stream, 0)?;
        let choice = Choice {
            normed: 0,
            norm: self.forward.norm_input(attended, self.tokens, layer.moe_norm, 0),
            route: self.inline_gate(index, layer, attended, middle)?,
        };
        let tokens = self.exchanged(index);
        let rows = exchange.choose_and_dispatch(self.gpu, &tokens, &choice)?;
        self.received_experts(layer, &rows)?;
        let stream = Stream { x0: middle, ..stream };
        let norm = NormRows {
            input: self.forward.norm_input(stream, self.tokens, 0, self.hidden()),
            ..NormRows::default()
        };
        let y = self.forward.places.expert_out;
        exchange.combine_few(self.gpu, &tokens, &FewResults { y, norm })
    }

    /// Two copies of the residual stream and two pairs of halves: no kernel writes what another block still reads.
    fn inline_place(&self, piece: usize) -> u64 {
        let (places, hidden) = (&self.forward.places, self.forward.sizes.hidden);
        places.halves + (piece * 2 * INLINE_TOKENS * hidden * 4) as u64
    }

    fn halves(&self, x0: u64) -> Stream {
        Stream {
            x0,
            x1: x0 + (self.tokens * self.forward.sizes.hidden * 4) as u64,
            more: 1,
        }
    }

    /// Attention and its output projection, added to the stream, in halves. `before`: where the stream itself goes, unless
    /// it lies in one piece.
    fn inline_attention(&self, layer: &Layer, stream: Stream, before: u64) -> Result<Stream> {
        const OP: &str = "forward";
        let (backend, forward, gpu, tokens) = (self.backend, self.forward, self.gpu, self.tokens);
        let places = &forward.places;
        let weights = &layer.handles.attention;
        let attended = self.inline_place(1);

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
            ..layer.attention
        };
        let cache = cache(backend, layer);
        attention::decode(gpu, cache, &params)?;

        let output = [backend.linear(OP, weights.o)?];
        let input = Input::Splits(attention::split_input(&params, &backend.step, cache));
        let residual = match before {
            0 => stream.x0,
            copy => copy,
        };
        let call = LinearCall {
            weights: &output,
            input,
            tokens,
            parts: 2,
            y: attended,
            residual,
            squares: 0,
        };
        linear(gpu, &call)?;
        Ok(self.halves(attended))
    }

    /// The gate's logits, in parts; the stream in one piece goes to `middle`.
    fn inline_gate(&self, index: usize, layer: &Layer, stream: Stream, middle: u64) -> Result<RouteParams> {
        let (backend, forward, tokens) = (self.backend, self.forward, self.tokens);
        let gate = [backend.linear("forward", layer.handles.gate)?];
        let call = LinearCall {
            weights: &gate,
            input: Input::Norm(forward.norm_input(stream, tokens, layer.moe_norm, middle)),
            tokens,
            parts: GATE_PARTS,
            y: forward.places.gate_logits,
            residual: 0,
            squares: 0,
        };
        linear(self.gpu, &call)?;
        backend.watch_gate(index, (tokens, forward.sizes.experts), GATE_PARTS)?;
        Ok(RouteParams {
            tokens: tokens as i32,
            parts: GATE_PARTS as i32,
            ..layer.route
        })
    }
}
