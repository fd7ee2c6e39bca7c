//! Experts of one piece of a long step: norm, gate, exchange or sort, both products, weighted sum.

use super::super::{Forward, Layer};
use super::{GATE_PARTS, parts_of, quantises};
use crate::backend::Result;
use crate::cuda::exchange::{Exchange, ManyResults, ManyRows, Tokens};
use crate::cuda::format::padded;
use crate::cuda::plane::{GemmCall, linear_gemm};
use crate::cuda::{CudaBackend, Gpu};
use crate::ops::combine::cuda::{self as combine, CombineSorted};
use crate::ops::experts::many::{ManyParams, SortParams, TILE_ROWS, products, sort, sorted_rows};
use crate::ops::quantise::cuda::{QuantiseParams, quantise_plane};
use crate::ops::rmsnorm::cuda::{CombineRows, NormInput, NormMany, NormRows, combine_rows, norm_many};
use crate::ops::route::cuda::{self as route, RouteParams, RouteTokens};

/// Norm, gate, exchange or sort, both products and the weighted sum of tokens [first, end).
pub(super) fn experts(
    backend: &CudaBackend,
    forward: &Forward,
    (index, layer): (usize, &Layer),
    (piece, (first, end)): (usize, (usize, usize)),
) -> Result<()> {
    let (gpu, sizes, places) = (&backend.gpu, &forward.sizes, &forward.places);
    let count = end - first;
    let hidden = places.hidden + (first * sizes.hidden * 4) as u64;
    let plane = plane(backend, forward, 0, count);
    if count > 0 {
        choose(backend, forward, (index, layer), (count, plane), hidden)?;
    }
    let area = &places.sort;
    let params = SortParams {
        ids: places.ids,
        plane: places.plane,
        tokens: count as i32,
        experts: sizes.experts as i32,
        plane_blocks: places.blocks as i32,
        ..sorted_to(forward)
    };
    if let Some(exchange) = backend.exchange() {
        let tokens = Tokens {
            layer: index,
            piece,
            count,
            ids: places.ids,
            weights: places.weights,
        };
        let rows = exchange.dispatch_many(gpu, &tokens, plane.0, plane.1)?;
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

/// Where sorted rows go.
fn sorted_to(forward: &Forward) -> SortParams {
    let (sizes, places) = (&forward.sizes, &forward.places);
    SortParams {
        sorted: places.sorted_plane,
        k: sizes.top_k as i32,
        steps: (padded(sizes.hidden) / 128) as i32,
        sorted_blocks: places.sorted_blocks as i32,
        tile_rows: TILE_ROWS as i32,
        ..SortParams::default()
    }
}

/// Sort and both products of the rows that came from all ranks; `hidden`: of the tokens that their results are added to.
pub(in crate::cuda::forward) fn work(
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
        &area.fill(rows.sort_params(shape, local, sorted_to(forward))),
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

/// Where the plane of the tokens for the experts is, and of how many blocks: where it can travel from, if it is to travel.
pub(in crate::cuda::forward) fn plane(
    backend: &CudaBackend,
    forward: &Forward,
    piece: usize,
    count: usize,
) -> (u64, usize) {
    let places = &forward.places;
    let travels = backend
        .exchange()
        .and_then(|exchange| exchange.plane(piece, count));
    travels.unwrap_or((places.plane, places.blocks))
}

/// Norm, gate and choice of `count` tokens from `hidden` on.
pub(in crate::cuda::forward) fn choose(
    backend: &CudaBackend,
    forward: &Forward,
    (index, layer): (usize, &Layer),
    (count, (plane, blocks)): (usize, (u64, usize)),
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
            plane,
            // Rows for other ranks travel as they are.
            quantised: match quantises(forward, layer.format) && backend.exchange().is_none() {
                true => places.quantised_plane,
                false => 0,
            },
            eps: sizes.eps,
            width: sizes.hidden as i32,
            padded: padded(sizes.hidden) as i32,
            plane_blocks: blocks as i32,
        },
    )?;
    let most = GATE_PARTS.min(padded(sizes.hidden) / 128);
    let gate = [backend.linear(OP, layer.handles.gate)?];
    let parts = parts_of(gpu, count, &gate, most);
    linear_gemm(
        gpu,
        &GemmCall {
            weights: &gate,
            plane,
            quantised: false,
            blocks,
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
