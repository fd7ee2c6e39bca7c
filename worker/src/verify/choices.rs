//! Which experts a run chose, from its router logits, and how a later run is held to them.

use std::sync::Arc;

use conclave_plan::model::{MoeSpec, Scoring};

use crate::checkpoint::Result;
use crate::weights::{WeightSource, modules};

/// How one layer chooses.
#[derive(Clone, Debug, PartialEq)]
pub struct Gate {
    pub spec: MoeSpec,
    /// `[experts]`; empty: none.
    pub bias: Vec<f32>,
}

impl Gate {
    /// Of every layer.
    pub fn all(source: &WeightSource) -> Result<Vec<Gate>> {
        let spec = source.spec();
        let layers = spec.layers.iter().enumerate();
        layers
            .map(|(index, layer)| {
                let bias = modules::layer(spec, index).selection_bias;
                let bias = bias.map(|module| source.vector(&module)).transpose()?;
                Ok(Gate {
                    spec: layer.moe.clone(),
                    bias: bias.unwrap_or_default(),
                })
            })
            .collect()
    }

    fn scores(&self, router_logits: &[f32]) -> Vec<f32> {
        match self.spec.scoring {
            Scoring::Sigmoid => router_logits.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect(),
            Scoring::Softmax => {
                let largest = router_logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let powers: Vec<f32> = router_logits.iter().map(|z| (z - largest).exp()).collect();
                let sum: f32 = powers.iter().sum();
                powers.iter().map(|power| power / sum).collect()
            }
        }
    }

    /// What one token's experts are chosen by: score and bias.
    pub fn keys(&self, router_logits: &[f32]) -> Vec<f32> {
        let scores = self.scores(router_logits).into_iter().enumerate();
        scores
            .map(|(expert, score)| score + self.bias.get(expert).copied().unwrap_or(0.0))
            .collect()
    }

    /// The best experts of one token, best first, the lower one first among equals.
    pub fn chosen(&self, keys: &[f32]) -> Vec<u32> {
        let mut order: Vec<u32> = (0..keys.len() as u32).collect();
        order.sort_by(|&a, &b| keys[b as usize].total_cmp(&keys[a as usize]));
        order.truncate(self.spec.top_k);
        order
    }

    fn weights(&self, router_logits: &[f32], ids: &[u32]) -> Vec<f32> {
        let scores = self.scores(router_logits);
        let chosen: Vec<f32> = ids.iter().map(|&id| scores[id as usize]).collect();
        let sum = match self.spec.renormalize {
            true => chosen.iter().sum(),
            false => 1.0,
        };
        chosen.iter().map(|score| score / sum).collect()
    }
}

/// The choices of a run over all positions of one sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct Choices {
    pub gates: Vec<Gate>,
    /// By layer, `[positions, top_k]`.
    pub ids: Vec<Vec<u32>>,
}

impl Choices {
    /// From router logits by layer, `[positions, experts]`.
    pub fn of(gates: &[Gate], router_logits: &[Vec<f32>]) -> Choices {
        let layers = gates.iter().zip(router_logits);
        let ids = layers.map(|(gate, logits)| {
            let tokens = logits.chunks(gate.spec.experts);
            tokens.flat_map(|z| gate.chosen(&gate.keys(z))).collect()
        });
        Choices {
            ids: ids.collect(),
            gates: gates.to_vec(),
        }
    }
}

/// Choices for the tokens of one step.
#[derive(Clone, Debug)]
pub struct Forced {
    pub choices: Arc<Choices>,
    /// Position of the step's first token.
    pub first: usize,
}

impl Forced {
    /// Ids and weights of a layer's tokens, whose router logits are these.
    pub(super) fn of(&self, layer: usize, router_logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let gate = &self.choices.gates[layer];
        let top_k = gate.spec.top_k;
        let tokens = router_logits.chunks(gate.spec.experts);
        let ids = &self.choices.ids[layer][self.first * top_k..][..tokens.len() * top_k];
        let weights = tokens.zip(ids.chunks(top_k));
        let weights = weights.flat_map(|(z, ids)| gate.weights(z, ids)).collect();
        (ids.to_vec(), weights)
    }
}
