//! A step of more than 128 tokens: matrix products over planes; attention in chunks of tokens, experts in larger ones.

mod attend;
mod experts;

use super::halves::{halves, in_halves};
use super::{ATTENTION_CHUNK, Forward, cache};
use crate::backend::Result;
use crate::cuda::format::padded;
use crate::cuda::plane::{GemmCall, linear_gemm, parts_for};
use crate::cuda::step::FEW_TOKENS;
use crate::cuda::weights::Linear;
use crate::cuda::workspace::Slot;
use crate::cuda::{CudaBackend, Format, Gpu, shape};
use crate::ops::attention::cuda::{PrefillPlans, head_blocks, small_blocks};
use crate::ops::embed::cuda::embed;
use crate::ops::rmsnorm::cuda::{NormInput, NormRows, norm_rows};
use attend::attend;
use experts::experts;
pub(super) use experts::{choose, plane, work};

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
            (0, single),
            small_blocks(cache(backend, &forward.layers[0]), false),
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

/// Parts of the inputs of a dense product whose results are added behind it: of few tokens, which one column of tiles holds, so many
/// that they occupy the device (`few` has room for them), else `many`.
fn parts_of(gpu: &Gpu, tokens: usize, weights: &[&Linear], many: usize) -> usize {
    match tokens {
        ..=FEW_TOKENS => parts_for(gpu, weights, tokens, false),
        _ => many,
    }
}

/// Whether weights of this format see quantised activations.
pub(super) fn quantises(forward: &Forward, format: Format) -> bool {
    forward.places.quantised_plane != 0 && matches!(format, Format::Fp8 | Format::Fp8Experts)
}
