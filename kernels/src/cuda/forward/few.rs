//! A step of at most 128 tokens: six launches a layer for up to four decode tokens, ten for more.

use super::{Forward, Layer, cache};
use crate::backend::Result;
use crate::cuda::format::padded;
use crate::cuda::plane::{linear_gemm, plane_blocks};
use crate::cuda::step::FEW_TOKENS;
use crate::cuda::{CudaBackend, Gpu};
use crate::ops::attention::cuda::{self as attention, AttentionParams, Pages, head_blocks};
use crate::ops::embed::cuda::embed;
use crate::ops::experts::cuda::{self as experts, ExpertParams};
use crate::ops::linear::cuda::{INLINE_TOKENS, Input, LinearCall, linear};
use crate::ops::qkv::cuda::{RopeParams, norm_kind, rope_kv};
use crate::ops::rmsnorm::cuda::{CombineRows, NormInput, NormRows, combine_rows, norm_rows};
use crate::ops::route::cuda::{self as route, GATE_PARTS, RouteParams, RouteTokens, max_groups};

/// Rows of logits from which on the head's weights are worth a matrix product instead of passes of eight.
const HEAD_GEMM_ROWS: usize = 9;

/// The residual stream between kernels: the sum of two arrays, or one.
#[derive(Clone, Copy)]
struct Stream {
    x0: u64,
    x1: u64,
}

pub(super) fn queue(
    backend: &CudaBackend,
    forward: &Forward,
    tokens: usize,
    rows: usize,
    inline: bool,
    logits: u64,
) -> Result<()> {
    const OP: &str = "forward";
    let (gpu, sizes, places) = (&backend.gpu, &forward.sizes, &forward.places);
    let (step, model) = (&backend.step, &forward.model);
    embed(
        gpu,
        backend.linear(OP, model.embedding)?,
        step.ids(),
        backend.sampled_tokens(),
        tokens,
        places.hidden,
    )?;
    step.queue_plan(
        gpu,
        head_blocks(sizes.heads, sizes.kv_width / (sizes.q_width / sizes.heads)),
        tokens,
    )?;
    let mut stream = Stream {
        x0: places.hidden,
        x1: 0,
    };
    let last = forward.layers.len() - 1;
    for (index, layer) in forward.layers.iter().enumerate() {
        if inline {
            stream = queue_inline(backend, forward, layer, tokens, stream)?;
        } else {
            let next = (index < last).then(|| forward.layers[index + 1].norm);
            if index == 0 {
                let input = NormInput {
                    x0: places.hidden,
                    weight: layer.norm,
                    eps: sizes.eps,
                    k: sizes.hidden as i32,
                    ..NormInput::default()
                };
                norm_rows(
                    gpu,
                    tokens,
                    &NormRows {
                        input,
                        image: places.images,
                        padded: padded(sizes.hidden) as i32,
                        ..NormRows::default()
                    },
                )?;
            }
            queue_grouped(backend, forward, layer, tokens, next)?;
        }
    }
    let norm = backend.vector(OP, model.final_norm, sizes.hidden)?;
    let heads = [backend.linear(OP, model.head)?];
    let input = NormInput {
        x0: stream.x0,
        x1: stream.x1,
        weight: norm,
        eps: sizes.eps,
        k: sizes.hidden as i32,
        ..NormInput::default()
    };
    let normed = NormRows {
        input,
        rows: step.logit_rows(),
        padded: padded(sizes.hidden) as i32,
        ..NormRows::default()
    };
    if rows >= HEAD_GEMM_ROWS && places.plane != 0 {
        let blocks = plane_blocks(FEW_TOKENS);
        norm_rows(
            gpu,
            rows,
            &NormRows {
                plane: places.plane,
                plane_blocks: blocks as i32,
                ..normed
            },
        )?;
        return linear_gemm(gpu, &heads, places.plane, blocks, rows, logits, 0);
    }
    norm_rows(
        gpu,
        rows,
        &NormRows {
            image: places.images,
            ..normed
        },
    )?;
    let input = Input::Images(places.images);
    linear(
        gpu,
        &LinearCall {
            weights: &heads,
            input,
            tokens: rows,
            parts: 1,
            y: logits,
            residual: 0,
            squares: 0,
        },
    )
}

/// One layer, everything but the products inside them. Returns where the residual stream is afterwards.
fn queue_inline(
    backend: &CudaBackend,
    forward: &Forward,
    layer: &Layer,
    tokens: usize,
    stream: Stream,
) -> Result<Stream> {
    const OP: &str = "forward";
    let (gpu, sizes, places) = (&backend.gpu, &forward.sizes, &forward.places);
    let weights = &layer.handles.attention;
    let norm = |stream: Stream, weight, sum_out| NormInput {
        x0: stream.x0,
        x1: stream.x1,
        weight,
        sum_out,
        eps: sizes.eps,
        k: sizes.hidden as i32,
    };
    // Two copies of the residual stream and two pairs of halves: no kernel writes what another block still reads.
    let at = |piece: usize| places.halves + (piece * 2 * INLINE_TOKENS * sizes.hidden * 4) as u64;
    let (before, attended, middle) = (at(0), at(1), at(2));

    let projections = [
        backend.linear(OP, weights.q)?,
        backend.linear(OP, weights.k)?,
        backend.linear(OP, weights.v)?,
    ];
    let input = Input::Norm(norm(stream, layer.norm, before));
    let squares = if layer.q_norm == 0 { 0 } else { places.squares };
    linear(
        gpu,
        &LinearCall {
            weights: &projections,
            input,
            tokens,
            parts: 1,
            y: places.projection,
            residual: 0,
            squares: places.squares,
        },
    )?;

    let params = AttentionParams {
        qkv: places.projection,
        squares,
        q_norm: layer.q_norm,
        k_norm: layer.k_norm,
        image: places.attended,
        image_padded: padded(sizes.q_width) as i32,
        ..layer.attention
    };
    attention::decode(gpu, cache(backend, layer), &params)?;

    let output = [backend.linear(OP, weights.o)?];
    let input = Input::Images(places.attended);
    linear(
        gpu,
        &LinearCall {
            weights: &output,
            input,
            tokens,
            parts: 2,
            y: attended,
            residual: before,
            squares: 0,
        },
    )?;
    let stream = Stream {
        x0: attended,
        x1: attended + (tokens * sizes.hidden * 4) as u64,
    };

    let gate = [backend.linear(OP, layer.handles.gate)?];
    let input = Input::Norm(norm(stream, layer.moe_norm, middle));
    linear(
        gpu,
        &LinearCall {
            weights: &gate,
            input,
            tokens,
            parts: GATE_PARTS,
            y: places.gate_logits,
            residual: 0,
            squares: 0,
        },
    )?;

    let params = ExpertParams {
        experts: layer.experts,
        acted: places.acted,
        input: norm(stream, layer.moe_norm, 0),
        route: RouteParams {
            tokens: tokens as i32,
            ..layer.route
        },
        residual: middle,
        halves: at(3),
        ..ExpertParams::default()
    };
    experts::gate_up_inline(gpu, layer.format, &params)?;
    experts::down_sum(
        gpu,
        layer.format,
        &ExpertParams {
            images: places.acted,
            ..params
        },
    )?;
    Ok(Stream {
        x0: at(3),
        x1: at(3) + (tokens * sizes.hidden * 4) as u64,
    })
}

/// One layer for more tokens: `hidden` holds the residual stream, `images` its norm; afterwards those of the next layer.
fn queue_grouped(
    backend: &CudaBackend,
    forward: &Forward,
    layer: &Layer,
    tokens: usize,
    next_norm: Option<u64>,
) -> Result<()> {
    const OP: &str = "forward";
    let (gpu, sizes, places): (&Gpu, _, _) = (&backend.gpu, &forward.sizes, &forward.places);
    let weights = &layer.handles.attention;
    let spec = &forward.model.spec.layers[0].attention;
    let hidden_padded = padded(sizes.hidden) as i32;
    let images = Input::Images(places.images);

    let projections = [
        backend.linear(OP, weights.q)?,
        backend.linear(OP, weights.k)?,
        backend.linear(OP, weights.v)?,
    ];
    backend.project(&projections, spec, places.images, tokens, places.projection)?;
    let cache = cache(backend, layer);
    let params = RopeParams {
        qkv: places.projection,
        parts: 1,
        tokens: tokens as i32,
        heads: sizes.heads as i32,
        rotary: sizes.rotary as i32,
        norm: norm_kind(spec.qk_norm),
        eps: sizes.eps,
        q_norm: layer.q_norm,
        k_norm: layer.k_norm,
        turns: places.turns,
        positions: backend.step.positions(),
        token_run: backend.step.token_run(),
        pages: Pages::new(cache, &backend.step),
        q: places.queries,
    };
    rope_kv(gpu, cache, &params)?;
    let params = AttentionParams {
        q: places.queries,
        image: places.attended,
        image_padded: padded(sizes.q_width) as i32,
        ..layer.attention
    };
    attention::decode(gpu, cache, &params)?;

    let output = [backend.linear(OP, weights.o)?];
    let input = Input::Images(places.attended);
    let parts = if output[0].padded() >= 256 { 2 } else { 1 };
    linear(
        gpu,
        &LinearCall {
            weights: &output,
            input,
            tokens,
            parts,
            y: places.halves,
            residual: places.hidden,
            squares: 0,
        },
    )?;

    let second = places.halves + (tokens * sizes.hidden * 4) as u64;
    let input = NormInput {
        x0: places.halves,
        x1: if parts == 2 { second } else { 0 },
        weight: layer.moe_norm,
        sum_out: places.hidden,
        eps: sizes.eps,
        k: sizes.hidden as i32,
    };
    norm_rows(
        gpu,
        tokens,
        &NormRows {
            input,
            image: places.images,
            padded: hidden_padded,
            ..NormRows::default()
        },
    )?;
    let gate = [backend.linear(OP, layer.handles.gate)?];
    linear(
        gpu,
        &LinearCall {
            weights: &gate,
            input: images,
            tokens,
            parts: GATE_PARTS,
            y: places.gate_logits,
            residual: 0,
            squares: 0,
        },
    )?;

    let params = RouteTokens {
        route: RouteParams {
            tokens: tokens as i32,
            ..layer.route
        },
        ids: places.ids,
        weights: places.weights,
        groups: places.groups,
        ..RouteTokens::default()
    };
    route::route_groups(gpu, &params)?;
    let params = ExpertParams {
        experts: layer.experts,
        groups: places.groups,
        images: places.images,
        acted: places.acted,
        y: places.expert_out,
        ..ExpertParams::default()
    };
    let groups = max_groups(tokens * sizes.top_k, sizes.experts);
    experts::gate_up_groups(gpu, layer.format, groups, &params)?;
    experts::down_groups(
        gpu,
        layer.format,
        groups,
        &ExpertParams {
            images: places.acted,
            ..params
        },
    )?;

    let input = NormInput {
        x0: places.hidden,
        sum_out: places.hidden,
        weight: next_norm.unwrap_or(0),
        eps: sizes.eps,
        k: sizes.hidden as i32,
        ..NormInput::default()
    };
    let image = if next_norm.is_some() { places.images } else { 0 };
    let norm = NormRows {
        input,
        image,
        padded: hidden_padded,
        ..NormRows::default()
    };
    combine_rows(
        gpu,
        tokens,
        &CombineRows {
            norm,
            y: places.expert_out,
            weights: places.weights,
            slots: sizes.top_k as i32,
            ..CombineRows::default()
        },
    )
}
