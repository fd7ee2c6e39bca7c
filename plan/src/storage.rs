//! How many bytes a model's tensors take in a checkpoint, per format.
//!
//! Only attention projections and experts are ever quantised. Embedding, head and norms take 2 bytes a value; the
//! gate and the selection bias are F32.

use serde::Serialize;

use crate::model::{LayerSpec, ModelSpec, tensor_name};
use crate::parameters::{LayerParameters, Parameters};
use crate::quant::{Int4Layout, QuantFormat, QuantSpec};

/// Format of a linear weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearFormat {
    /// BF16 or F16.
    SixteenBit,
    Quantised(QuantFormat),
}

/// Formats of the parts of a model that may be quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StorageFormat {
    pub attention: LinearFormat,
    pub experts: LinearFormat,
}

/// Bytes of a model's tensors by what they belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct StorageBytes {
    pub embedding_and_head: u64,
    /// All norms, gates and selection biases.
    pub norms_and_gates: u64,
    pub attention: u64,
    /// All experts of all layers.
    pub experts: u64,
    /// One expert of the first layer.
    pub expert: u64,
}

pub const FP8_BLOCK: LinearFormat = LinearFormat::Quantised(QuantFormat::Fp8Block { block: [128, 128] });

impl LinearFormat {
    /// 4 bits with zero points, in groups of `group` inputs: AWQ.
    pub const fn awq(group: usize) -> LinearFormat {
        LinearFormat::Quantised(QuantFormat::Int4 {
            layout: Int4Layout::AwqGemm,
            group,
            zero_points: true,
        })
    }

    /// compressed-tensors, symmetric.
    pub const fn pack_quantized(group: usize) -> LinearFormat {
        LinearFormat::Quantised(QuantFormat::Int4 {
            layout: Int4Layout::PackQuantized,
            group,
            zero_points: false,
        })
    }

    /// Bytes of one weight `[out, inputs]` with its scales, zero points and index tensors.
    pub fn bytes(&self, out: u64, inputs: u64) -> u64 {
        let values = out * inputs;
        match *self {
            LinearFormat::SixteenBit => 2 * values,
            LinearFormat::Quantised(QuantFormat::Fp8Block {
                block: [rows, columns],
            }) => values + 4 * out.div_ceil(rows as u64) * inputs.div_ceil(columns as u64),
            LinearFormat::Quantised(QuantFormat::Int4 {
                layout,
                group,
                zero_points,
            }) => {
                let groups = out * inputs.div_ceil(group as u64);
                let zeros = if zero_points { groups / 2 } else { 0 };
                // g_idx I32 [inputs]; weight_shape I64 [2].
                let index = match layout {
                    Int4Layout::AwqGemm => 0,
                    Int4Layout::Gptq => 4 * inputs,
                    Int4Layout::PackQuantized => 16,
                };
                values / 2 + 2 * groups + zeros + index
            }
        }
    }
}

impl StorageFormat {
    pub const SIXTEEN_BIT: StorageFormat = StorageFormat {
        attention: LinearFormat::SixteenBit,
        experts: LinearFormat::SixteenBit,
    };

    /// What the config says its checkpoint holds.
    pub fn of(spec: &ModelSpec, quant: Option<&QuantSpec>) -> StorageFormat {
        let of = |pattern: &str| match quant {
            Some(quant) if quant.covers(&tensor_name(pattern, 0, 0)) => LinearFormat::Quantised(quant.format),
            _ => LinearFormat::SixteenBit,
        };
        StorageFormat {
            attention: of(&spec.names.q),
            experts: of(&spec.names.expert_gate),
        }
    }

    /// One expert: w1 and w3 `[intermediate, hidden]`, w2 `[hidden, intermediate]`.
    pub fn expert_bytes(&self, hidden: usize, layer: &LayerSpec) -> u64 {
        let (hidden, intermediate) = (hidden as u64, layer.moe.intermediate as u64);
        2 * self.experts.bytes(intermediate, hidden) + self.experts.bytes(hidden, intermediate)
    }

    /// The four projections of a layer.
    pub fn attention_bytes(&self, hidden: usize, layer: &LayerSpec) -> u64 {
        let hidden = hidden as u64;
        let (q, kv) = (
            layer.attention.q_width() as u64,
            layer.attention.kv_width() as u64,
        );
        self.attention.bytes(q, hidden)
            + 2 * self.attention.bytes(kv, hidden)
            + self.attention.bytes(hidden, q)
    }

    pub fn bytes(&self, spec: &ModelSpec) -> StorageBytes {
        let parameters = Parameters::of(spec);
        let mut bytes = StorageBytes {
            embedding_and_head: 2 * (parameters.embedding + parameters.head),
            norms_and_gates: 2 * parameters.final_norm,
            attention: 0,
            experts: 0,
            expert: self.expert_bytes(spec.hidden, &spec.layers[0]),
        };
        for layer in &spec.layers {
            let parameters = LayerParameters::of(spec.hidden, layer);
            bytes.norms_and_gates += 2 * parameters.norms + 4 * (parameters.gate + parameters.bias);
            bytes.attention += self.attention_bytes(spec.hidden, layer);
            bytes.experts += layer.moe.experts as u64 * self.expert_bytes(spec.hidden, layer);
        }
        bytes
    }
}

impl StorageBytes {
    pub fn total(&self) -> u64 {
        self.replicated() + self.experts
    }

    /// What every rank of an expert-parallel group holds.
    pub fn replicated(&self) -> u64 {
        self.embedding_and_head + self.norms_and_gates + self.attention
    }
}
