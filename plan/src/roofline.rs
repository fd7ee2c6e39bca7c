//! What one decode step must read, send and multiply, and the time that reading alone takes. A lower bound on the
//! step's time, to hold measurements against; nothing here is a prediction of speed.

use serde::Serialize;

use crate::balance;
use crate::memory::kv_bytes_per_token;
use crate::model::{LayerSpec, ModelSpec};
use crate::parameters::{LayerParameters, Parameters};
use crate::placement::Placement;
use crate::storage::StorageFormat;

/// Experts of a layer that a batch of `batch` tokens is expected to touch, if routing is uniform:
/// `E (1 - (1 - k/E)^batch)`.
pub fn distinct_experts(experts: usize, top_k: usize, batch: u64) -> f64 {
    let (experts, top_k) = (experts as f64, top_k as f64);
    experts * (1.0 - (1.0 - top_k / experts).powi(i32::try_from(batch).unwrap_or(i32::MAX)))
}

/// Bytes that one decode step reads over the whole group.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StepBytes {
    pub weights: f64,
    pub kv: f64,
}

/// One decode step of `batch` sequences that have `context` tokens each. Weights count once for the group.
pub fn step_bytes(
    spec: &ModelSpec,
    format: &StorageFormat,
    batch: u64,
    context: u64,
    kv_value_bytes: u64,
) -> StepBytes {
    let touched = |layer: &LayerSpec| distinct_experts(layer.moe.experts, layer.moe.top_k, batch);
    bytes_of(spec, format, touched, (batch, context), kv_value_bytes)
}

/// The same of the busiest of `ranks` ranks, which hold the experts evenly and have the sequences evenly: layer by layer
/// the others wait for the one that reads most. With one rank it is [`step_bytes`].
pub fn busiest_rank_bytes(
    spec: &ModelSpec,
    format: &StorageFormat,
    (batch, ranks): (u64, u32),
    context: u64,
    kv_value_bytes: u64,
) -> StepBytes {
    if ranks <= 1 {
        return step_bytes(spec, format, batch, context, kv_value_bytes);
    }
    const DRAWS: u32 = 400;
    let busiest = |layer: &LayerSpec| {
        let placement = Placement::even(layer.moe.experts as u32, ranks);
        let batch = u32::try_from(batch).unwrap_or(u32::MAX);
        balance::busiest_rank_experts(&placement, layer.moe.top_k as u32, batch, DRAWS)
    };
    let mut known: Option<(usize, usize, f64)> = None;
    let touched = |layer: &LayerSpec| {
        let (experts, top_k) = (layer.moe.experts, layer.moe.top_k);
        match known {
            Some((of, k, touched)) if (of, k) == (experts, top_k) => touched,
            _ => known.insert((experts, top_k, busiest(layer))).2,
        }
    };
    let sequences = batch.div_ceil(u64::from(ranks));
    bytes_of(spec, format, touched, (sequences, context), kv_value_bytes)
}

fn bytes_of(
    spec: &ModelSpec,
    format: &StorageFormat,
    mut touched: impl FnMut(&LayerSpec) -> f64,
    (sequences, context): (u64, u64),
    kv_value_bytes: u64,
) -> StepBytes {
    let layer = |layer: &LayerSpec| {
        let parameters = LayerParameters::of(spec.hidden, layer);
        let fixed = 4 * (parameters.gate + parameters.bias)
            + 2 * parameters.norms
            + format.attention_bytes(spec.hidden, layer);
        fixed as f64 + touched(layer) * format.expert_bytes(spec.hidden, layer) as f64
    };
    let head = 2 * spec.vocab as u64 * spec.hidden as u64;
    let embedding_rows = 2 * spec.hidden as u64 * sequences;
    StepBytes {
        weights: spec.layers.iter().map(layer).sum::<f64>() + (head + embedding_rows) as f64,
        kv: (sequences * context * kv_bytes_per_token(spec, kv_value_bytes)) as f64,
    }
}

impl StepBytes {
    /// Seconds to read them with `bandwidth` bytes per second.
    pub fn seconds(&self, bandwidth: f64) -> f64 {
        (self.weights + self.kv) / bandwidth
    }
}

/// Operations per token with the weights, two for each multiply-add.
pub fn flops_per_token(spec: &ModelSpec) -> u64 {
    let layer = |layer: &LayerSpec| {
        let parameters = LayerParameters::of(spec.hidden, layer);
        parameters.attention + parameters.gate + layer.moe.top_k as u64 * parameters.expert
    };
    2 * (spec.layers.iter().map(layer).sum::<u64>() + Parameters::of(spec).embedding)
}

/// The part of [`flops_per_token`] that the experts do.
pub fn expert_flops_per_token(spec: &ModelSpec) -> u64 {
    let layer = |layer: &LayerSpec| {
        let parameters = LayerParameters::of(spec.hidden, layer);
        layer.moe.top_k as u64 * parameters.expert
    };
    2 * spec.layers.iter().map(layer).sum::<u64>()
}

/// Operations per token of attention over `context` tokens.
pub fn attention_flops(spec: &ModelSpec, context: u64) -> u64 {
    let width = |layer: &LayerSpec| layer.attention.q_width() as u64;
    4 * spec.layers.iter().map(width).sum::<u64>() * context
}

/// Bytes one token sends in one layer if each of its experts is on another rank: BF16 activations.
pub fn dispatch_bytes_bf16(spec: &ModelSpec) -> u64 {
    spec.layers[0].moe.top_k as u64 * spec.hidden as u64 * 2
}

/// The same as FP8 with one F32 scale per 128 values.
pub fn dispatch_bytes_fp8(spec: &ModelSpec) -> u64 {
    let hidden = spec.hidden as u64;
    spec.layers[0].moe.top_k as u64 * (hidden + hidden / 128 * 4)
}
