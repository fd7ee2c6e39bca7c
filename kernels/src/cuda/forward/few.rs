//! A step of at most 128 tokens: six launches a layer for up to four decode tokens, eleven for more.
//!
//! Dense weights go through passes of eight tokens with activations of 16 bits of mantissa, or, for more tokens, through
//! matrix products of BF16. Deterministic steps use the passes only: the order of every sum is then the same whatever
//! the batch, and longer steps are cut into pieces of 128 tokens.

use super::{Forward, Layer, Way, cache};
use crate::backend::Result;
use crate::cuda::exchange::{Exchange, FewResults, Tokens};
use crate::cuda::format::padded;
use crate::cuda::plane::{GemmCall, MAX_PARTS, linear_gemm, parts_for, plane_blocks};
use crate::cuda::step::FEW_TOKENS;
use crate::cuda::weights::Linear;
use crate::cuda::{CudaBackend, Gpu};
use crate::ops::attention::cuda::{self as attention, AttentionParams, Pages, head_blocks};
use crate::ops::embed::cuda::embed;
use crate::ops::experts::cuda::{self as experts, ExpertParams};
use crate::ops::linear::cuda::{INLINE_TOKENS, Input, LinearCall, linear};
use crate::ops::qkv::cuda::{RopeParams, norm_kind, rope_kv};
use crate::ops::rmsnorm::cuda::{CombineRows, NormInput, NormRows, combine_rows, norm_rows};
use crate::ops::route::cuda::{self as route, GATE_PARTS, RouteParams, RouteTokens, max_groups};

/// From so many tokens on dense weights are worth a matrix product instead of passes of eight.
const PRODUCT_TOKENS: usize = 9;
/// Into how many parts the passes cut the output projection, whose rows alone do not occupy the device.
const OUTPUT_PARTS: usize = 2;

/// The residual stream between kernels: `x0`, and `more` arrays of one step's tokens from `x1` on, to be added.
#[derive(Clone, Copy)]
struct Stream {
    x0: u64,
    x1: u64,
    more: usize,
}

/// One piece of a step and how it is computed.
struct Piece<'a> {
    backend: &'a CudaBackend,
    forward: &'a Forward,
    gpu: &'a Gpu,
    /// First token, and how many.
    first: usize,
    tokens: usize,
    /// Dense weights through matrix products.
    products: bool,
}

/// Bytes of the dense results' parts for `tokens` tokens of `width` values.
pub(super) fn parts_bytes(tokens: usize, width: usize) -> usize {
    MAX_PARTS * tokens * width * 4
}

/// How a step is cut.
pub(super) struct Pieces {
    pub(super) tokens: usize,
    /// Tokens of a piece but the last; in a group some pieces of a rank may be empty.
    pub(super) each: usize,
    pub(super) count: usize,
    pub(super) rows: usize,
    pub(super) way: Way,
}

pub(super) fn queue(backend: &CudaBackend, forward: &Forward, pieces: &Pieces, logits: u64) -> Result<()> {
    let mut stream = Stream {
        x0: forward.places.hidden,
        x1: 0,
        more: 0,
    };
    for index in 0..pieces.count {
        let first = (index * pieces.each).min(pieces.tokens);
        let count = pieces.each.min(pieces.tokens - first);
        let products = count >= PRODUCT_TOKENS && !backend.deterministic;
        let piece = Piece {
            backend,
            forward,
            gpu: &backend.gpu,
            first,
            tokens: count,
            products,
        };
        if count == 0 {
            piece.serve_others()?;
            continue;
        }
        stream = piece.layers(pieces.way)?;
    }
    // After several pieces `stream` is the whole hidden state, which holds all of them.
    head(backend, forward, stream, pieces.rows, logits)
}

/// The final norm of the wanted rows, and their logits.
fn head(backend: &CudaBackend, forward: &Forward, stream: Stream, rows: usize, logits: u64) -> Result<()> {
    const OP: &str = "forward";
    let (gpu, sizes, places) = (&backend.gpu, &forward.sizes, &forward.places);
    let heads = [backend.linear(OP, forward.model.head)?];
    let norm = backend.vector(OP, forward.model.final_norm, sizes.hidden)?;
    for first in (0..rows).step_by(FEW_TOKENS) {
        let count = FEW_TOKENS.min(rows - first);
        let y = logits + (first * sizes.vocab * 4) as u64;
        let normed = NormRows {
            input: forward.norm_input(stream, backend.step.tokens.min(FEW_TOKENS), norm, 0),
            rows: backend.step.logit_rows() + first as u64 * 4,
            padded: padded(sizes.hidden) as i32,
            ..NormRows::default()
        };
        if count >= PRODUCT_TOKENS && !backend.deterministic {
            let (plane, blocks) = (places.plane, plane_blocks(FEW_TOKENS));
            norm_rows(
                gpu,
                count,
                &NormRows {
                    plane,
                    plane_blocks: blocks as i32,
                    ..normed
                },
            )?;
            let call = GemmCall {
                weights: &heads,
                plane,
                blocks,
                tokens: count,
                parts: 1,
                y,
                residual: 0,
            };
            linear_gemm(gpu, &call)?;
        } else {
            norm_rows(
                gpu,
                count,
                &NormRows {
                    normed: places.normed,
                    ..normed
                },
            )?;
            let input = Input::Rows(places.normed);
            let call = LinearCall {
                weights: &heads,
                input,
                tokens: count,
                parts: 1,
                y,
                residual: 0,
                squares: 0,
            };
            linear(gpu, &call)?;
        }
    }
    Ok(())
}

impl Forward {
    /// The norm of a residual stream of `tokens` tokens; `sum_out`: where the stream itself goes, if anywhere.
    fn norm_input(&self, stream: Stream, tokens: usize, weight: u64, sum_out: u64) -> NormInput {
        NormInput {
            x0: stream.x0,
            x1: stream.x1,
            weight,
            sum_out,
            eps: self.sizes.eps,
            k: self.sizes.hidden as i32,
            more: stream.more as i32,
            stride: (tokens * self.sizes.hidden) as i32,
        }
    }
}

impl Piece<'_> {
    /// Embedding and all layers; returns where the residual stream is.
    fn layers(&self, way: Way) -> Result<Stream> {
        const OP: &str = "forward";
        let (backend, forward, gpu) = (self.backend, self.forward, self.gpu);
        let (sizes, places, step) = (&forward.sizes, &forward.places, &backend.step);
        let table = backend.linear(OP, forward.model.embedding)?;
        let ids = step.ids() + self.first as u64 * 4;
        embed(
            gpu,
            table,
            ids,
            backend.sampled_tokens(),
            self.tokens,
            self.hidden(),
        )?;
        if let Some(one) = forward.one_of(way) {
            one.queue(gpu)?;
            return Ok(Stream {
                x0: one.params.after,
                x1: one.params.after + (sizes.hidden * 4) as u64,
                more: 1,
            });
        }
        let kv_heads = sizes.kv_width / (sizes.q_width / sizes.heads);
        step.queue_plan(gpu, head_blocks(sizes.heads, kv_heads), self.first, self.tokens)?;
        let mut stream = Stream {
            x0: self.hidden(),
            x1: 0,
            more: 0,
        };
        if way != Way::Grouped {
            for layer in &forward.layers {
                stream = self.inline_layer(layer, stream)?;
            }
            return Ok(stream);
        }
        let norms = forward
            .layers
            .iter()
            .skip(1)
            .map(|layer| Some(layer.norm))
            .chain([None]);
        for (index, (layer, next)) in forward.layers.iter().zip(norms).enumerate() {
            if index == 0 {
                self.norm(stream, layer.norm, 0, false)?;
            }
            self.grouped_layer(index, layer, next)?;
        }
        Ok(Stream {
            x0: places.hidden,
            x1: 0,
            more: 0,
        })
    }

    fn hidden(&self) -> u64 {
        self.forward.places.hidden + (self.first * self.forward.sizes.hidden * 4) as u64
    }

    /// The norm as the dense weights want it, and as the experts do.
    fn norm(&self, stream: Stream, weight: u64, sum_out: u64, for_experts: bool) -> Result<()> {
        let places = &self.forward.places;
        let norm = NormRows {
            input: self.forward.norm_input(stream, self.tokens, weight, sum_out),
            normed: if for_experts || !self.products {
                places.normed
            } else {
                0
            },
            plane: if self.products { places.plane } else { 0 },
            plane_blocks: plane_blocks(FEW_TOKENS) as i32,
            padded: padded(self.forward.sizes.hidden) as i32,
            ..NormRows::default()
        };
        norm_rows(self.gpu, self.tokens, &norm)
    }

    /// A dense weight times the rows or the plane; returns the number of parts in `y`.
    fn dense(
        &self,
        weights: &[&Linear],
        from: (u64, u64),
        parts: usize,
        y: u64,
        residual: u64,
    ) -> Result<usize> {
        let (rows, plane) = from;
        if self.products {
            let rows = weights.iter().map(|weight| weight.rows).sum();
            let parts = parts_for(self.gpu, rows, weights[0].padded());
            let blocks = plane_blocks(FEW_TOKENS);
            linear_gemm(
                self.gpu,
                &GemmCall {
                    weights,
                    plane,
                    blocks,
                    tokens: self.tokens,
                    parts,
                    y,
                    residual,
                },
            )?;
            return Ok(parts);
        }
        let parts = parts.min(weights[0].padded() / 128);
        let input = Input::Rows(rows);
        linear(
            self.gpu,
            &LinearCall {
                weights,
                input,
                tokens: self.tokens,
                parts,
                y,
                residual,
                squares: 0,
            },
        )?;
        Ok(parts)
    }

    /// One layer of up to four decode tokens. Every kernel does the norm it needs itself.
    fn inline_layer(&self, layer: &Layer, stream: Stream) -> Result<Stream> {
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

    /// One layer for more tokens: `hidden` holds the residual stream, rows or plane its norm; afterwards those of the
    /// next layer.
    fn grouped_layer(&self, index: usize, layer: &Layer, next_norm: Option<u64>) -> Result<()> {
        const OP: &str = "forward";
        let (backend, forward, gpu, tokens) = (self.backend, self.forward, self.gpu, self.tokens);
        let (sizes, places, step) = (&forward.sizes, &forward.places, &backend.step);
        let weights = &layer.handles.attention;
        let spec = &forward.model.spec.layers[0].attention;
        let normed = (places.normed, places.plane);

        let projections = [weights.q, weights.k, weights.v].map(|id| backend.linear(OP, id));
        let [q, k, v] = projections;
        let parts = self.dense(&[q?, k?, v?], normed, 1, places.projection, 0)?;
        let cache = cache(backend, layer);
        let params = RopeParams {
            qkv: places.projection,
            parts: parts as i32,
            tokens: tokens as i32,
            heads: sizes.heads as i32,
            rotary: sizes.rotary as i32,
            norm: norm_kind(spec.qk_norm),
            eps: sizes.eps,
            q_norm: layer.q_norm,
            k_norm: layer.k_norm,
            turns: places.turns,
            positions: step.positions() + self.first as u64 * 4,
            token_run: step.token_run() + self.first as u64 * 4,
            pages: Pages::new(cache, step),
            q: places.queries,
        };
        rope_kv(gpu, cache, &params)?;
        let params = AttentionParams {
            q: places.queries,
            out: if self.products { 0 } else { places.attended },
            plane: if self.products { places.attended_plane } else { 0 },
            plane_blocks: plane_blocks(FEW_TOKENS) as i32,
            ..layer.attention.at(step, self.first)
        };
        attention::decode(gpu, cache, &params)?;

        let output = [backend.linear(OP, weights.o)?];
        let attended = (places.attended, places.attended_plane);
        let parts = self.dense(&output, attended, OUTPUT_PARTS, places.halves, self.hidden())?;
        let x1 = places.halves + (tokens * sizes.hidden * 4) as u64;
        self.norm(
            Stream {
                x0: places.halves,
                x1,
                more: parts - 1,
            },
            layer.moe_norm,
            self.hidden(),
            true,
        )?;

        let gate = [backend.linear(OP, layer.handles.gate)?];
        let parts = self.dense(&gate, normed, GATE_PARTS, places.gate_logits, 0)?;
        let params = RouteTokens {
            route: RouteParams {
                tokens: tokens as i32,
                parts: parts as i32,
                ..layer.route
            },
            ids: places.ids,
            weights: places.weights,
            groups: places.groups,
            arrived: places.route_arrived,
            ..RouteTokens::default()
        };
        let exchange = backend.exchange();
        if let Some(exchange) = exchange {
            route::route(gpu, &params)?;
            self.received_experts(exchange, index, layer)?;
        } else {
            route::route_groups(gpu, &params)?;
            let params = ExpertParams {
                experts: layer.experts,
                groups: places.groups,
                x: places.normed,
                acted: places.acted,
                y: places.expert_out,
                ..ExpertParams::default()
            };
            self.expert_groups(layer, max_groups(tokens * sizes.top_k, sizes.experts), &params)?;
        }

        let stream = Stream {
            x0: self.hidden(),
            x1: 0,
            more: 0,
        };
        let weight = next_norm.unwrap_or(0);
        let wanted = |place: u64, used: bool| if used && next_norm.is_some() { place } else { 0 };
        let norm = NormRows {
            input: forward.norm_input(stream, tokens, weight, self.hidden()),
            normed: wanted(places.normed, !self.products),
            plane: wanted(places.plane, self.products),
            plane_blocks: plane_blocks(FEW_TOKENS) as i32,
            padded: padded(sizes.hidden) as i32,
            ..NormRows::default()
        };
        if let Some(exchange) = exchange {
            let y = places.expert_out;
            return exchange.combine_few(gpu, &self.exchanged(index), &FewResults { y, norm });
        }
        let (y, weights, slots) = (places.expert_out, places.weights, sizes.top_k as i32);
        combine_rows(
            gpu,
            tokens,
            &CombineRows {
                norm,
                y,
                weights,
                slots,
                ..CombineRows::default()
            },
        )
    }

    fn exchanged(&self, layer: usize) -> Tokens {
        let places = &self.forward.places;
        Tokens {
            layer,
            piece: 0,
            count: self.tokens,
            ids: places.ids,
            weights: places.weights,
        }
    }

    /// Both products of the rows that came from all ranks, this one included.
    fn received_experts(&self, exchange: &dyn Exchange, index: usize, layer: &Layer) -> Result<()> {
        let places = &self.forward.places;
        let rows = exchange.dispatch_few(self.gpu, &self.exchanged(index), places.normed)?;
        let params = ExpertParams {
            experts: layer.experts,
            groups: rows.groups,
            x: rows.x,
            acted: places.acted,
            y: places.expert_out,
            ..ExpertParams::default()
        };
        self.expert_groups(layer, rows.most_groups, &params)
    }

    fn expert_groups(&self, layer: &Layer, most: usize, params: &ExpertParams) -> Result<()> {
        experts::gate_up_groups(self.gpu, layer.format, most, params)?;
        let down = ExpertParams {
            x: params.acted,
            ..*params
        };
        experts::down_groups(self.gpu, layer.format, most, &down)
    }

    /// A piece in which this rank has no tokens: its experts work for the others.
    fn serve_others(&self) -> Result<()> {
        let Some(exchange) = self.backend.exchange() else {
            return Ok(());
        };
        let places = &self.forward.places;
        let stream = Stream {
            x0: places.hidden,
            x1: 0,
            more: 0,
        };
        let norm = NormRows {
            input: self.forward.norm_input(stream, 0, 0, places.hidden),
            ..NormRows::default()
        };
        for (index, layer) in self.forward.layers.iter().enumerate() {
            self.received_experts(exchange, index, layer)?;
            let y = places.expert_out;
            exchange.combine_few(self.gpu, &self.exchanged(index), &FewResults { y, norm })?;
        }
        Ok(())
    }
}
