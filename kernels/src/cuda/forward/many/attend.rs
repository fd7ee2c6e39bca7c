//! Attention of one piece of a long step: norm, projections, rotation, attention, output projection.

use super::super::{Forward, Layer, Places, cache, rotation};
use super::{parts_of, quantises};
use crate::backend::{KvDtype, Result};
use crate::cuda::format::padded;
use crate::cuda::plane::{GemmCall, gives_bf16, linear_gemm, linear_gemm_bf16};
use crate::cuda::{CudaBackend, Gpu};
use crate::ops::attention::cuda::{self as attention, AttentionParams, PrefillPlan, PrefillRows};
use crate::ops::qkv::cuda::{RopeParams, rope_kv};
use crate::ops::quantise::cuda::{QuantiseParams, quantise_plane};
use crate::ops::rmsnorm::cuda::{NormMany, norm_many};

/// Norm, projections, attention and output projection of tokens [first, end).
pub(super) fn attend(
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
    let parts = match quantised {
        true => 1,
        false => parts_of(gpu, count, &projections, 1),
    };
    let call = GemmCall {
        weights: &projections,
        plane: plane.max(quantised_plane),
        quantised,
        blocks,
        tokens: count,
        parts,
        y: places.projection,
        residual: 0,
    };
    let cache = cache(backend, layer);
    // BF16 keys and values are rounded so in any case, and it is half of what the product writes and `rope_kv` reads.
    let bf16 = parts == 1 && cache.dtype == KvDtype::Bf16 && gives_bf16(&projections, count);
    match bf16 {
        true => linear_gemm_bf16(gpu, &call)?,
        false => linear_gemm(gpu, &call)?,
    }
    let decoded = if first == 0 { single } else { 0 };
    // Behind the rows of the tokens that are decoded.
    let q16 = match attention::wide(cache) {
        true => places.queries + (decoded * sizes.q_width * 4) as u64,
        false => 0,
    };
    let params = RopeParams {
        q16,
        first16: match q16 {
            0 => i32::MAX,
            _ => decoded as i32,
        },
        scale: attention::scale(cache.head_dim),
        bf16: bf16 as i32,
        ..rotation(backend, forward, layer, (first, count), parts)
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
