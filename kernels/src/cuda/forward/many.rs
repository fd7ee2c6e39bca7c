//! A step of more than 128 tokens: matrix products over planes; attention in chunks of tokens, experts in larger ones.

use super::halves::{halves, in_halves};
use super::{ATTENTION_CHUNK, Forward, Layer, Places, cache};
use crate::backend::Result;
use crate::cuda::exchange::{Exchange, ManyResults, ManyRows, Tokens};
use crate::cuda::format::padded;
use crate::cuda::plane::{GemmCall, linear_gemm, parts_for};
use crate::cuda::step::FEW_TOKENS;
use crate::cuda::workspace::Slot;
use crate::cuda::{CudaBackend, Format, Gpu, shape};
use crate::ops::attention::cuda::{
    self as attention, AttentionParams, Pages, PrefillPlan, PrefillPlans, PrefillRows, head_blocks,
};
use crate::ops::combine::cuda::{self as combine, CombineSorted};
use crate::ops::embed::cuda::embed;
use crate::ops::experts::many::{ManyParams, SortParams, products, sort, sorted_rows, tile_rows};
use crate::ops::qkv::cuda::{RopeParams, norm_kind, rope_kv};
use crate::ops::quantise::cuda::{QuantiseParams, quantise_plane};
use crate::ops::rmsnorm::cuda::{
    CombineRows, NormInput, NormMany, NormRows, combine_rows, norm_many, norm_rows,
};
use crate::ops::route::cuda::{self as route, RouteParams, RouteTokens};

/// Cuts of the gate's inputs: its few rows alone do not occupy the device.
pub(super) const GATE_PARTS: usize = 2;

/// `chunk`: tokens of a piece of the experts' work, and how many pieces: in a group some may be empty.
pub(super) fn queue(
    backend: &CudaBackend,
    forward: &Forward,
    chunk: (usize, usize),
    logits: u64,
) -> Result<()> {
    const OP: &str = "forward";
    let (gpu, sizes, places, step) = (&backend.gpu, &forward.sizes, &forward.places, &backend.step);
    let tokens = step.tokens;
    if tokens == 0 {
        return serve_others(backend, forward, chunk);
    }
    embed(
        gpu,
        backend.linear(OP, forward.model.embedding)?,
        step.ids(),
        backend.sampled_tokens(),
        tokens,
        places.hidden,
    )?;
    // The decode tokens in front of the prompts: split over their contexts.
    let single = step
        .runs
        .iter()
        .take_while(|run| run.1 == 1)
        .count()
        .min(FEW_TOKENS);
    if single > 0 {
        step.queue_plan(
            gpu,
            head_blocks(sizes.heads, sizes.kv_width / (sizes.q_width / sizes.heads)),
            0,
            single,
        )?;
    }
    let pieces = |chunk: usize| {
        (0..tokens)
            .step_by(chunk)
            .map(move |first| (first, tokens.min(first + chunk)))
    };
    let area = backend
        .workspace
        .memory(Slot::PrefillBlocks)
        .ok_or_else(|| shape(OP, "workspace", "absent", "present"))?;
    let per_kv = sizes.q_width / sizes.kv_width;
    let kind = (cache(backend, &forward.layers[0]), per_kv);
    if let Some(halves) = halves(backend, chunk) {
        let plan = PrefillPlans::new(gpu, area, step, pieces(chunk.0), single, kind)?;
        in_halves(backend, forward, halves, chunk, |layer, piece, range| {
            attend(backend, forward, layer, range, single, plan.piece(piece))
        })?;
    } else {
        let plan = PrefillPlans::new(gpu, area, step, pieces(ATTENTION_CHUNK), single, kind)?;
        for (index, layer) in forward.layers.iter().enumerate() {
            for (piece, range) in pieces(ATTENTION_CHUNK).enumerate() {
                attend(backend, forward, layer, range, single, plan.piece(piece))?;
            }
            for range in ranges(tokens, chunk) {
                experts(backend, forward, (index, layer), range)?;
            }
        }
    }
    let rows = step.logit_count;
    let norm = backend.vector(OP, forward.model.final_norm, sizes.hidden)?;
    let heads = [backend.linear(OP, forward.model.head)?];
    let input = NormInput {
        x0: places.hidden,
        weight: norm,
        eps: sizes.eps,
        k: sizes.hidden as i32,
        ..NormInput::default()
    };
    let (plane, plane_blocks) = (places.plane, places.blocks as i32);
    let normed = NormRows {
        input,
        rows: step.logit_rows(),
        plane,
        plane_blocks,
        padded: padded(sizes.hidden) as i32,
        ..NormRows::default()
    };
    norm_rows(gpu, rows, &normed)?;
    linear_gemm(
        gpu,
        &GemmCall {
            weights: &heads,
            plane: places.plane,
            quantised: false,
            blocks: places.blocks,
            tokens: rows,
            parts: 1,
            y: logits,
            residual: 0,
        },
    )
}

/// The pieces of `tokens` tokens: index, (first, end).
pub(super) fn ranges(
    tokens: usize,
    (each, pieces): (usize, usize),
) -> impl Iterator<Item = (usize, (usize, usize))> {
    (0..pieces).map(move |i| (i, ((i * each).min(tokens), ((i + 1) * each).min(tokens))))
}

/// A step in which this rank has no tokens: its experts work for the others.
fn serve_others(backend: &CudaBackend, forward: &Forward, chunk: (usize, usize)) -> Result<()> {
    if let Some(halves) = halves(backend, chunk) {
        return in_halves(backend, forward, halves, chunk, |_, _, _| Ok(()));
    }
    for layer in forward.layers.iter().enumerate() {
        for range in ranges(0, chunk) {
            experts(backend, forward, layer, range)?;
        }
    }
    Ok(())
}

/// Norm, projections, attention and output projection of tokens [first, end).
fn attend(
    backend: &CudaBackend,
    forward: &Forward,
    layer: &Layer,
    (first, end): (usize, usize),
    single: usize,
    plan: Option<PrefillPlan>,
) -> Result<()> {
    const OP: &str = "forward";
    let (gpu, sizes, places, step) = (&backend.gpu, &forward.sizes, &forward.places, &backend.step);
    let count = end - first;
    let hidden = places.hidden + (first * sizes.hidden * 4) as u64;
    let (blocks, plane_blocks) = (places.blocks, places.blocks as i32);
    let weights = &layer.handles.attention;
    let projections = [
        backend.linear(OP, weights.q)?,
        backend.linear(OP, weights.k)?,
        backend.linear(OP, weights.v)?,
    ];
    let quantised = quantises(forward, projections[0].format);
    // One of the two planes.
    let (plane, quantised_plane) = match quantised {
        true => (0, places.quantised_plane),
        false => (places.plane, 0),
    };
    norm_many(
        gpu,
        count,
        &NormMany {
            x: hidden,
            weight: layer.norm,
            plane,
            quantised: quantised_plane,
            eps: sizes.eps,
            width: sizes.hidden as i32,
            padded: padded(sizes.hidden) as i32,
            plane_blocks,
        },
    )?;
    let rows = projections.iter().map(|projection| projection.rows).sum();
    let parts = match quantised {
        true => 1,
        false => parts_of(gpu, count, rows, projections[0].padded(), 1),
    };
    linear_gemm(
        gpu,
        &GemmCall {
            weights: &projections,
            plane: plane.max(quantised_plane),
            quantised,
            blocks,
            tokens: count,
            parts,
            y: places.projection,
            residual: 0,
        },
    )?;
    let spec = &forward.model.spec.layers[0].attention;
    let cache = cache(backend, layer);
    let decoded = if first == 0 { single } else { 0 };
    // Behind the rows of the tokens that are decoded.
    let q16 = match attention::wide(cache) {
        true => places.queries + (decoded * sizes.q_width * 4) as u64,
        false => 0,
    };
    let params = RopeParams {
        qkv: places.projection,
        parts: parts as i32,
        tokens: count as i32,
        heads: sizes.heads as i32,
        rotary: sizes.rotary as i32,
        norm: norm_kind(spec.qk_norm),
        eps: sizes.eps,
        q_norm: layer.q_norm,
        k_norm: layer.k_norm,
        turns: places.turns,
        positions: step.positions() + first as u64 * 4,
        token_run: step.token_run() + first as u64 * 4,
        pages: Pages::new(cache, step),
        q: places.queries,
        q16,
        first16: match q16 {
            0 => i32::MAX,
            _ => decoded as i32,
        },
        scale: attention::scale(cache.head_dim),
    };
    rope_kv(gpu, cache, &params)?;
    if first == 0 && single > 0 {
        let params = AttentionParams {
            q: places.queries,
            plane: places.attended_plane,
            plane_blocks,
            ..layer.attention
        };
        attention::decode(gpu, cache, &params)?;
    }
    if let Some(plan) = plan {
        let rows = PrefillRows {
            q: places.queries,
            q16,
            out: 0,
            plane: places.attended_plane,
            plane_blocks: blocks,
        };
        attention::prefill(gpu, step, cache, sizes.heads, plan, rows)?;
    }
    let output = [backend.linear(OP, weights.o)?];
    let quantised = quantises(forward, output[0].format);
    let mut plane = places.attended_plane;
    if quantised {
        quantise_tokens(gpu, places, plane, (count, sizes.q_width))?;
        plane = places.quantised_plane;
    }
    linear_gemm(
        gpu,
        &GemmCall {
            weights: &output,
            plane,
            quantised,
            blocks,
            tokens: count,
            parts: 1,
            y: hidden,
            residual: hidden,
        },
    )
}

/// Parts of the inputs of a dense product whose results are added behind it: of few tokens, which one column of tiles holds, so many
/// that they occupy the device (`few` has room for them), else `many`.
fn parts_of(gpu: &Gpu, tokens: usize, rows: usize, padded: usize, many: usize) -> usize {
    match tokens {
        ..=FEW_TOKENS => parts_for(gpu, rows, padded),
        _ => many,
    }
}

/// Quantises a plane of `rows` tokens.
fn quantise_tokens(gpu: &Gpu, places: &Places, plane: u64, (rows, inputs): (usize, usize)) -> Result<()> {
    let params = QuantiseParams {
        plane,
        quantised: places.quantised_plane,
        count: 0,
        rows: rows as i32,
        chunks: (padded(inputs) / 128) as i32,
        blocks: places.blocks as i32,
    };
    quantise_plane(gpu, &params)
}

/// Norm, gate, exchange or sort, both products and the weighted sum of tokens [first, end).
fn experts(
    backend: &CudaBackend,
    forward: &Forward,
    (index, layer): (usize, &Layer),
    (piece, (first, end)): (usize, (usize, usize)),
) -> Result<()> {
    let (gpu, sizes, places) = (&backend.gpu, &forward.sizes, &forward.places);
    let count = end - first;
    let hidden = places.hidden + (first * sizes.hidden * 4) as u64;
    if count > 0 {
        choose(backend, forward, (index, layer), count, hidden)?;
    }
    let area = &places.sort;
    let params = SortParams {
        ids: places.ids,
        plane: places.plane,
        tokens: count as i32,
        experts: sizes.experts as i32,
        plane_blocks: places.blocks as i32,
        ..sorted_to(forward, layer)
    };
    if let Some(exchange) = backend.exchange() {
        let tokens = Tokens {
            layer: index,
            piece,
            count,
            ids: places.ids,
            weights: places.weights,
        };
        let rows = exchange.dispatch_many(gpu, &tokens, places.plane, places.blocks)?;
        let results = work(gpu, forward, layer, exchange, &rows, hidden)?;
        return exchange.combine_many(gpu, &tokens, &results);
    }
    let params = match quantises(forward, layer.format) {
        true => SortParams {
            plane: places.quantised_plane,
            sorted: places.quantised_sorted,
            quantised: 1,
            ..params
        },
        false => params,
    };
    sort(gpu, &area.fill(params))?;
    both_products(
        gpu,
        forward,
        layer,
        sorted_rows(count * sizes.top_k, sizes.experts),
    )?;
    if combine::fits(sizes.hidden) {
        let params = CombineSorted {
            hidden,
            sorted: places.sorted_plane,
            row_of_slot: area.row_of_slot,
            weights: places.weights,
            width: sizes.hidden as i32,
            slots: sizes.top_k as i32,
        };
        return combine::combine_sorted(gpu, count, &params);
    }
    let input = NormInput {
        x0: hidden,
        sum_out: hidden,
        k: sizes.hidden as i32,
        ..NormInput::default()
    };
    let params = CombineRows {
        norm: NormRows {
            input,
            ..NormRows::default()
        },
        sorted: places.sorted_plane,
        row_of_slot: area.row_of_slot,
        weights: places.weights,
        slots: sizes.top_k as i32,
        ..CombineRows::default()
    };
    combine_rows(gpu, count, &params)
}

/// Whether weights of this format see quantised activations.
fn quantises(forward: &Forward, format: Format) -> bool {
    forward.places.quantised_plane != 0 && format == Format::Fp8
}

/// Where sorted rows go.
fn sorted_to(forward: &Forward, layer: &Layer) -> SortParams {
    let (sizes, places) = (&forward.sizes, &forward.places);
    SortParams {
        sorted: places.sorted_plane,
        k: sizes.top_k as i32,
        steps: (padded(sizes.hidden) / 128) as i32,
        sorted_blocks: places.sorted_blocks as i32,
        tile_rows: tile_rows(quantises(forward, layer.format)) as i32,
        ..SortParams::default()
    }
}

/// Sort and both products of the rows that came from all ranks; `hidden`: of the tokens that their results are added to.
pub(super) fn work(
    gpu: &Gpu,
    forward: &Forward,
    layer: &Layer,
    exchange: &dyn Exchange,
    rows: &ManyRows,
    hidden: u64,
) -> Result<ManyResults> {
    let (area, shape, local) = (&forward.places.sort, exchange.shape()?, exchange.local_experts()?);
    sort(
        gpu,
        &area.fill(rows.sort_params(shape, local, sorted_to(forward, layer))),
    )?;
    let most = sorted_rows(shape.many_rows() * forward.sizes.top_k, local);
    if quantises(forward, layer.format) {
        // The rows have travelled before they are quantised.
        quantise_plane(gpu, &sorted_quantise(forward, (most, rows.total)))?;
    }
    both_products(gpu, forward, layer, most)?;
    Ok(ManyResults {
        sorted: forward.places.sorted_plane,
        row_of_slot: area.row_of_slot,
        hidden,
    })
}

/// How the plane of the sorted rows is quantised: `most` at most, the number stands at `count`.
fn sorted_quantise(forward: &Forward, (most, count): (usize, u64)) -> QuantiseParams {
    QuantiseParams {
        plane: forward.places.sorted_plane,
        quantised: forward.places.quantised_sorted,
        count,
        rows: most as i32,
        chunks: (padded(forward.sizes.hidden) / 128) as i32,
        blocks: forward.places.sorted_blocks as i32,
    }
}

/// Norm, gate and choice of `count` tokens from `hidden` on.
pub(super) fn choose(
    backend: &CudaBackend,
    forward: &Forward,
    (index, layer): (usize, &Layer),
    count: usize,
    hidden: u64,
) -> Result<()> {
    const OP: &str = "forward";
    let (gpu, sizes, places) = (&backend.gpu, &forward.sizes, &forward.places);
    norm_many(
        gpu,
        count,
        &NormMany {
            x: hidden,
            weight: layer.moe_norm,
            plane: places.plane,
            // Rows for other ranks travel as they are.
            quantised: match quantises(forward, layer.format) && backend.exchange().is_none() {
                true => places.quantised_plane,
                false => 0,
            },
            eps: sizes.eps,
            width: sizes.hidden as i32,
            padded: padded(sizes.hidden) as i32,
            plane_blocks: places.blocks as i32,
        },
    )?;
    let most = GATE_PARTS.min(padded(sizes.hidden) / 128);
    let parts = parts_of(gpu, count, sizes.experts, padded(sizes.hidden), most);
    linear_gemm(
        gpu,
        &GemmCall {
            weights: &[backend.linear(OP, layer.handles.gate)?],
            plane: places.plane,
            quantised: false,
            blocks: places.blocks,
            tokens: count,
            parts,
            y: places.gate_logits,
            residual: 0,
        },
    )?;
    backend.watch_gate(index, (count, sizes.experts), parts)?;
    let params = RouteTokens {
        route: RouteParams {
            tokens: count as i32,
            parts: parts as i32,
            ..layer.route
        },
        ids: places.ids,
        weights: places.weights,
        ..RouteTokens::default()
    };
    route::route(gpu, &params)
}

/// Both products of the sorted rows, of which there are `most` at most.
fn both_products(gpu: &Gpu, forward: &Forward, layer: &Layer, most: usize) -> Result<()> {
    let places = &forward.places;
    let quantise = quantises(forward, layer.format);
    // The activations lie in the same memory either way.
    let plane = match quantise {
        true => places.quantised_sorted,
        false => places.sorted_plane,
    };
    let up = ManyParams {
        experts: layer.experts,
        tiles: places.sort.tiles,
        tile_count: places.sort.tile_count,
        plane,
        acted: places.acted_plane,
        y: 0,
        blocks: places.sorted_blocks as i32,
    };
    // The sorted rows have been read when `down` writes: their place takes its result.
    let down = ManyParams {
        plane: places.acted_plane,
        acted: 0,
        y: places.sorted_plane,
        ..up
    };
    products(gpu, layer.format, quantise, most, &up, &down)
}
