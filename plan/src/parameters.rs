//! How many parameters a model has, part by part. A parameter is a weight: scales, zero points and index tensors of
//! quantised checkpoints are not counted here (see [`storage`](crate::storage)).

use serde::Serialize;

use crate::model::{LayerSpec, ModelSpec, QkNorm};

/// Parameters of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LayerParameters {
    pub q: u64,
    pub k: u64,
    pub v: u64,
    pub o: u64,
    /// The four projections together.
    pub attention: u64,
    /// Both layer norms, and the norms of queries and keys.
    pub norms: u64,
    pub gate: u64,
    /// Selection bias.
    pub bias: u64,
    /// One expert: w1, w2 and w3.
    pub expert: u64,
    /// All experts.
    pub experts: u64,
    /// Everything in the layer.
    pub total: u64,
}

/// Parameters of a whole model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Parameters {
    pub embedding: u64,
    /// 0 if the head is the embedding.
    pub head: u64,
    pub final_norm: u64,
    /// The first layer; models of one block have all layers alike.
    pub layer: LayerParameters,
    /// Attention projections of all layers.
    pub attention: u64,
    /// Experts of all layers.
    pub experts: u64,
    pub total: u64,
    /// What one token's forward pass multiplies with: the head and its `top_k` experts, without the embedding table.
    pub active: u64,
}

impl LayerParameters {
    pub fn of(hidden: usize, layer: &LayerSpec) -> LayerParameters {
        let hidden = hidden as u64;
        let attention = &layer.attention;
        let (q_width, kv_width) = (attention.q_width() as u64, attention.kv_width() as u64);
        let (q, kv) = (q_width * hidden, kv_width * hidden);
        let qk_norms = match attention.qk_norm {
            QkNorm::None => 0,
            QkNorm::PerHead => 2 * attention.head_dim as u64,
            QkNorm::WholeProjection => q_width + kv_width,
        };
        let experts = layer.moe.experts as u64;
        let expert = 3 * layer.moe.intermediate as u64 * hidden;
        let mut parameters = LayerParameters {
            q,
            k: kv,
            v: kv,
            o: q,
            attention: 2 * q + 2 * kv,
            norms: 2 * hidden + qk_norms,
            gate: experts * hidden,
            bias: if layer.moe.selection_bias { experts } else { 0 },
            expert,
            experts: experts * expert,
            total: 0,
        };
        parameters.total = parameters.fixed() + parameters.experts;
        parameters
    }

    /// Everything but the experts: what each rank of an expert-parallel group holds.
    pub fn fixed(&self) -> u64 {
        self.attention + self.norms + self.gate + self.bias
    }
}

impl Parameters {
    pub fn of(spec: &ModelSpec) -> Parameters {
        let layers = || {
            spec.layers
                .iter()
                .map(|layer| (layer, LayerParameters::of(spec.hidden, layer)))
        };
        let embedding = spec.vocab as u64 * spec.hidden as u64;
        let head = if spec.names.head == spec.names.embedding {
            0
        } else {
            embedding
        };
        let final_norm = spec.hidden as u64;
        Parameters {
            embedding,
            head,
            final_norm,
            layer: LayerParameters::of(spec.hidden, &spec.layers[0]),
            attention: layers().map(|(_, p)| p.attention).sum(),
            experts: layers().map(|(_, p)| p.experts).sum(),
            total: embedding + head + final_norm + layers().map(|(_, p)| p.total).sum::<u64>(),
            active: embedding
                + final_norm
                + layers()
                    .map(|(layer, p)| p.fixed() + layer.moe.top_k as u64 * p.expert)
                    .sum::<u64>(),
        }
    }
}
