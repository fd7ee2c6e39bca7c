//! One layer of up to 128 tokens, in ten kernels: rows sorted by expert, here or by the exchange with other ranks.

use conclave_plan::model::QkNorm;

use super::{OUTPUT_PARTS, Piece, Stream, Wanted};
use crate::backend::{KvDtype, Result};
use crate::cuda::exchange::{Choice, FewResults, FewRows, Tokens};
use crate::cuda::format::padded;
use crate::cuda::forward::{Layer, cache, rotation};
use crate::cuda::plane::plane_blocks;
use crate::cuda::step::FEW_TOKENS;
use crate::ops::attention::cuda::{self as attention, AttentionParams};
use crate::ops::experts::cuda::{self as experts, ExpertParams, Rows};
use crate::ops::qkv::cuda::{RopeParams, rope_few};
use crate::ops::quantise::cuda::{QuantiseParams, quantise_plane};
use crate::ops::rmsnorm::cuda::{CombineRows, NormRows, combine_few, combine_rows, norm_few};
use crate::ops::route::cuda::{self as route, RouteParams, RouteTokens, max_groups};

impl Piece<'_> {
    /// One layer for more tokens: `hidden` holds the residual stream, rows or plane its norm; afterwards those of the
    /// next layer.
    pub(super) fn grouped_layer(&self, index: usize, layer: &Layer, next: Option<Wanted>) -> Result<()> {
        const OP: &str = "forward";
        let (backend, forward, gpu, tokens) = (self.backend, self.forward, self.gpu, self.tokens);
        let (sizes, places) = (&forward.sizes, &forward.places);
        let weights = &layer.handles.attention;
        let projections = [weights.q, weights.k, weights.v].map(|id| backend.linear(OP, id));
        let [q, k, v] = projections;
        let projections = [q?, k?, v?];
        let cache = cache(backend, layer);
        // As of many tokens: BF16 keys and values are rounded so in any case.
        let per_head = forward.model.spec.layers[0].attention.qk_norm == QkNorm::PerHead;
        let rounded = cache.dtype == KvDtype::Bf16 && !per_head;
        let (parts, bf16) = match self.products {
            true => self.product(&projections, places.plane, places.projection, rounded)?,
            false => (
                self.passes(&projections, places.normed, 1, places.projection, 0)?,
                false,
            ),
        };
        let params = RopeParams {
            bf16: bf16 as i32,
            ..rotation(backend, forward, layer, (self.first, tokens), parts)
        };
        rope_few(gpu, cache, &params)?;
        let params = AttentionParams {
            q: places.queries,
            out: if self.products { 0 } else { places.attended },
            plane: if self.products { places.attended_plane } else { 0 },
            plane_blocks: plane_blocks(FEW_TOKENS) as i32,
            ..layer.attention
        };
        attention::decode(gpu, cache, &params)?;

        let output = [backend.linear(OP, weights.o)?];
        if self.quantised(output[0]) {
            let params = QuantiseParams {
                plane: places.attended_plane,
                quantised: places.quantised_plane,
                rows: tokens as i32,
                chunks: (padded(sizes.q_width) / 128) as i32,
                blocks: plane_blocks(FEW_TOKENS) as i32,
                ..QuantiseParams::default()
            };
            quantise_plane(gpu, &params)?;
        }
        // The norm adds up what the product leaves, and the residual if the product has not.
        let (stream, bf16) = match self.products {
            true => {
                let (more, bf16) = self.product(&output, places.attended_plane, places.halves, true)?;
                let (x0, x1) = (self.hidden(), places.halves);
                (Stream { x0, x1, more }, bf16)
            }
            false => {
                let (x0, rows) = (places.halves, places.attended);
                let parts = self.passes(&output, rows, OUTPUT_PARTS, x0, self.hidden())?;
                let (x1, more) = (x0 + (tokens * sizes.hidden * 4) as u64, parts - 1);
                (Stream { x0, x1, more }, false)
            }
        };
        let wanted = Wanted {
            norm: layer.moe_norm,
            quantised: false,
        };
        let norm = NormRows {
            input: forward.norm_input(stream, tokens, wanted.norm, self.hidden()),
            bf16_parts: bf16 as i32,
            ..self.norm_places(Some(wanted), true)
        };
        norm_few(gpu, tokens, &norm)?;

        let parts = self.gate(backend.linear(OP, layer.handles.gate)?, places.gate_logits)?;
        self.chosen_experts(index, layer, parts, next)
    }

    /// The rest of a layer whose gate has left its logits in `parts`, of the rows in `normed`.
    pub(super) fn chosen_experts(
        &self,
        index: usize,
        layer: &Layer,
        parts: usize,
        next: Option<Wanted>,
    ) -> Result<()> {
        let (backend, forward, gpu, tokens) = (self.backend, self.forward, self.gpu, self.tokens);
        let (sizes, places) = (&forward.sizes, &forward.places);
        backend.watch_gate(index, (tokens, sizes.experts), parts)?;
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
        if let Some(exchange) = exchange.filter(|exchange| exchange.chooses() && params.route.softmax == 0) {
            let choice = Choice {
                normed: places.normed,
                route: params.route,
                ..Choice::default()
            };
            let rows = exchange.choose_and_dispatch(gpu, &self.exchanged(index), &choice)?;
            self.received_experts(layer, &rows)?;
        } else if let Some(exchange) = exchange {
            route::route(gpu, &params)?;
            let rows = exchange.dispatch_few(gpu, &self.exchanged(index), places.normed)?;
            self.received_experts(layer, &rows)?;
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
            let most = max_groups(tokens * sizes.top_k, sizes.experts);
            self.expert_groups(layer, (most, Rows::Any), &params)?;
        }

        let stream = Stream {
            x0: self.hidden(),
            x1: 0,
            more: 0,
        };
        let weight = next.map_or(0, |next| next.norm);
        let norm = NormRows {
            input: forward.norm_input(stream, tokens, weight, self.hidden()),
            ..self.norm_places(next, false)
        };
        if let Some(exchange) = exchange {
            let y = places.expert_out;
            return exchange.combine_few(gpu, &self.exchanged(index), &FewResults { y, norm });
        }
        let (y, weights, slots) = (places.expert_out, places.weights, sizes.top_k as i32);
        let params = CombineRows {
            norm,
            y,
            weights,
            slots,
            ..CombineRows::default()
        };
        match backend.deterministic {
            // The order in which `combine_few` of an exchange adds squares, so that one rank's results are those of several.
            true => combine_rows(gpu, tokens, &params),
            false => combine_few(gpu, tokens, &params),
        }
    }

    pub(super) fn exchanged(&self, layer: usize) -> Tokens {
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
    pub(super) fn received_experts(&self, layer: &Layer, rows: &FewRows) -> Result<()> {
        let places = &self.forward.places;
        let params = ExpertParams {
            experts: layer.experts,
            groups: rows.groups,
            x: rows.x,
            acted: places.acted,
            y: places.expert_out,
            ..ExpertParams::default()
        };
        self.expert_groups(layer, (rows.most_groups, rows.kind), &params)
    }

    fn expert_groups(&self, layer: &Layer, (most, rows): (usize, Rows), params: &ExpertParams) -> Result<()> {
        experts::gate_up_groups(self.gpu, layer.format, most, rows, params)?;
        let down = ExpertParams {
            x: params.acted,
            ..*params
        };
        experts::down_groups(self.gpu, layer.format, most, &down)
    }

    /// A piece in which this rank has no tokens: its experts work for the others.
    pub(super) fn serve_others(&self) -> Result<()> {
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
            let rows = exchange.dispatch_few(self.gpu, &self.exchanged(index), places.normed)?;
            self.received_experts(layer, &rows)?;
            let y = places.expert_out;
            exchange.combine_few(self.gpu, &self.exchanged(index), &FewResults { y, norm })?;
        }
        Ok(())
    }
}
