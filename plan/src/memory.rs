//! What lies on each rank, and how many tokens of KV cache fit beside it. Activations, graphs and the library's own
//! memory come on top and are not known here: a worker prints what it really has.

use serde::Serialize;

use crate::error::{PlanError, Result};
use crate::model::ModelSpec;
use crate::placement::Placement;
use crate::storage::StorageFormat;

/// Bytes that one token's keys and values take over all layers, with `value_bytes` per value (BF16 2, FP8 1).
pub fn kv_bytes_per_token(spec: &ModelSpec, value_bytes: u64) -> u64 {
    let width = |layer: &crate::model::LayerSpec| 2 * layer.attention.kv_width() as u64;
    spec.layers.iter().map(width).sum::<u64>() * value_bytes
}

/// Weights on one rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct RankBytes {
    pub rank: u32,
    /// Experts of the first layer.
    pub experts: u32,
    /// Attention, embedding, head, norms and gates: the same on every rank.
    pub replicated: u64,
    pub expert_weights: u64,
}

impl RankBytes {
    pub fn total(&self) -> u64 {
        self.replicated + self.expert_weights
    }
}

/// The weights of every rank under a placement.
pub fn ranks(spec: &ModelSpec, format: &StorageFormat, placement: &Placement) -> Vec<RankBytes> {
    let replicated = format.bytes(spec).replicated();
    let held = |rank, layer| placement.experts_of(layer, rank).len() as u64;
    let rank = |rank: u32| {
        let experts = |(index, layer)| held(rank, index) * format.expert_bytes(spec.hidden, layer);
        RankBytes {
            rank,
            experts: held(rank, 0) as u32,
            replicated,
            expert_weights: spec.layers.iter().enumerate().map(experts).sum(),
        }
    };
    (0..placement.ranks).map(rank).collect()
}

/// Tokens of KV cache that fit into `memory` bytes beside `weights` bytes; 0 if the weights do not fit.
pub fn kv_tokens(memory: u64, weights: u64, kv_bytes_per_token: u64) -> u64 {
    memory.saturating_sub(weights) / kv_bytes_per_token.max(1)
}

/// How many experts of each layer fit into `memory` bytes beside everything that every rank holds and `reserve`
/// bytes for KV cache and activations.
pub fn expert_capacity(spec: &ModelSpec, format: &StorageFormat, memory: u64, reserve: u64) -> u32 {
    let free = memory.saturating_sub(format.bytes(spec).replicated() + reserve);
    let one_of_each_layer: u64 = spec
        .layers
        .iter()
        .map(|layer| format.expert_bytes(spec.hidden, layer))
        .sum();
    let most = spec
        .layers
        .iter()
        .map(|layer| layer.moe.experts)
        .max()
        .unwrap_or(0) as u64;
    (free / one_of_each_layer.max(1)).min(most) as u32
}

/// The fewest ranks of `memory` bytes each that hold the model and `reserve` bytes each for KV cache and activations.
pub fn fewest_ranks(spec: &ModelSpec, format: &StorageFormat, memory: u64, reserve: u64) -> Result<u32> {
    let experts = spec
        .layers
        .iter()
        .map(|layer| layer.moe.experts)
        .max()
        .unwrap_or(0) as u32;
    match expert_capacity(spec, format, memory, reserve) {
        0 => Err(PlanError::Placement {
            problem: format!(
                "a rank of {memory} bytes does not hold one expert of each layer beside the {} bytes that every rank holds \
                 and {reserve} reserved",
                format.bytes(spec).replicated()
            ),
            advice: "take a checkpoint of fewer bits, or devices with more memory",
        }),
        capacity => Ok(experts.div_ceil(capacity)),
    }
}
