//! Which modules a model consists of: name and shape of each, as the executor asks for them.

use conclave_plan::model::{ModelSpec, QkNorm, tensor_name};

/// A linear module by its name without `.weight`, and its shape `[out, in]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearModule {
    pub name: String,
    pub out_features: usize,
    pub in_features: usize,
}

/// A vector by its whole tensor name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VectorModule {
    pub name: String,
    pub len: usize,
}

/// One layer without its experts.
#[derive(Clone, Debug)]
pub struct LayerModules {
    pub attention_norm: VectorModule,
    pub moe_norm: VectorModule,
    pub q: LinearModule,
    pub k: LinearModule,
    pub v: LinearModule,
    pub o: LinearModule,
    pub q_norm: Option<VectorModule>,
    pub k_norm: Option<VectorModule>,
    pub gate: LinearModule,
    pub selection_bias: Option<VectorModule>,
}

/// Gate (w1), up (w3) and down (w2) of one expert.
#[derive(Clone, Debug)]
pub struct ExpertModules {
    pub gate: LinearModule,
    pub up: LinearModule,
    pub down: LinearModule,
}

fn linear(name: String, out_features: usize, in_features: usize) -> LinearModule {
    LinearModule {
        name,
        out_features,
        in_features,
    }
}

fn norm(name: String, len: usize) -> VectorModule {
    VectorModule {
        name: format!("{name}.weight"),
        len,
    }
}

/// `[vocab, hidden]`.
pub fn embedding(spec: &ModelSpec) -> LinearModule {
    linear(spec.names.embedding.clone(), spec.vocab, spec.hidden)
}

/// `[vocab, hidden]`; the embedding itself if the two are tied.
pub fn head(spec: &ModelSpec) -> LinearModule {
    linear(spec.names.head.clone(), spec.vocab, spec.hidden)
}

pub fn final_norm(spec: &ModelSpec) -> VectorModule {
    norm(spec.names.final_norm.clone(), spec.hidden)
}

/// Everything of `layer` that every rank holds.
pub fn layer(spec: &ModelSpec, layer: usize) -> LayerModules {
    let (names, hidden) = (&spec.names, spec.hidden);
    let LayerShape {
        q,
        kv,
        head,
        norm: qk_norm,
        experts,
        bias,
    } = LayerShape::of(spec, layer);
    let name = |pattern: &str| tensor_name(pattern, layer, 0);
    let head_norm = |pattern: &str, whole: usize| match qk_norm {
        QkNorm::None => None,
        QkNorm::PerHead => Some(norm(name(pattern), head)),
        QkNorm::WholeProjection => Some(norm(name(pattern), whole)),
    };
    LayerModules {
        attention_norm: norm(name(&names.attention_norm), hidden),
        moe_norm: norm(name(&names.moe_norm), hidden),
        q: linear(name(&names.q), q, hidden),
        k: linear(name(&names.k), kv, hidden),
        v: linear(name(&names.v), kv, hidden),
        o: linear(name(&names.o), hidden, q),
        q_norm: head_norm(&names.q_norm, q),
        k_norm: head_norm(&names.k_norm, kv),
        gate: linear(name(&names.gate), experts, hidden),
        selection_bias: bias.then(|| VectorModule {
            name: name(&names.selection_bias),
            len: experts,
        }),
    }
}

struct LayerShape {
    q: usize,
    kv: usize,
    head: usize,
    norm: QkNorm,
    experts: usize,
    bias: bool,
}

impl LayerShape {
    fn of(spec: &ModelSpec, layer: usize) -> LayerShape {
        let layer = &spec.layers[layer];
        LayerShape {
            q: layer.attention.q_width(),
            kv: layer.attention.kv_width(),
            head: layer.attention.head_dim,
            norm: layer.attention.qk_norm,
            experts: layer.moe.experts,
            bias: layer.moe.selection_bias,
        }
    }
}

pub fn expert(spec: &ModelSpec, layer: usize, expert: usize) -> ExpertModules {
    let (names, hidden) = (&spec.names, spec.hidden);
    let intermediate = spec.layers[layer].moe.intermediate;
    let name = |pattern: &str| tensor_name(pattern, layer, expert);
    ExpertModules {
        gate: linear(name(&names.expert_gate), intermediate, hidden),
        up: linear(name(&names.expert_up), intermediate, hidden),
        down: linear(name(&names.expert_down), hidden, intermediate),
    }
}
