//! What a backend gives out for memory and weights, and a model made of them.

use conclave_plan::model::ModelSpec;

use crate::weight::HostLinear;

/// Memory of a backend: a handle, meaningful only to the backend that gave it.
#[derive(Debug)]
pub struct Buffer {
    pub handle: u64,
    pub bytes: usize,
}

/// A linear weight on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinearId(pub u32);

/// The experts of one layer that this rank holds, in local order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ExpertsId(pub u32);

/// A vector parameter (norm weight, selection bias), kept as F32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct VectorId(pub u32);

/// KV cache of one layer: pages of `page_tokens` tokens, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KvId(pub u32);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvDtype {
    /// Exact; for comparing with a reference. CPU only.
    F32,
    Bf16,
    Fp8E4m3,
    Fp8E5m2,
}

#[derive(Clone, Copy, Debug)]
pub struct AttentionWeights {
    pub norm: VectorId,
    pub q: LinearId,
    pub k: LinearId,
    pub v: LinearId,
    pub o: LinearId,
    pub q_norm: Option<VectorId>,
    pub k_norm: Option<VectorId>,
}

/// Experts as the host has them, in local order: gate (w1), up (w3), down (w2).
pub struct HostExpert {
    pub gate: HostLinear,
    pub up: HostLinear,
    pub down: HostLinear,
}

/// A whole model whose experts are all on this device, for backends that run a step without the host in between.
#[derive(Clone, Debug)]
pub struct ForwardModel {
    pub spec: ModelSpec,
    pub embedding: LinearId,
    pub final_norm: VectorId,
    pub head: LinearId,
    pub layers: Vec<ForwardLayer>,
}

#[derive(Clone, Copy, Debug)]
pub struct ForwardLayer {
    pub attention: AttentionWeights,
    pub kv: KvId,
    pub moe_norm: VectorId,
    pub gate: LinearId,
    pub selection_bias: Option<VectorId>,
    pub experts: ExpertsId,
}
