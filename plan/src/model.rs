//! A model as data over a small set of blocks. A family (MiniMax-M2, …) is a file that turns a `config.json`
//! into this; workers and kernels know only this.

/// Everything the executor needs to know about a model's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of the config, e.g. `minimax_m2`.
    pub family: String,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Rows of the embedding and of the head.
    pub vocab: usize,
    pub rms_eps: f32,
    /// Longest sequence in tokens.
    pub max_position: usize,
    pub layers: Vec<LayerSpec>,
    pub eos_token_ids: Vec<u32>,
    pub bos_token_id: Option<u32>,
    /// Names of the tensors in the checkpoint.
    pub names: TensorNames,
}

/// One decoder layer: `x += attention(norm(x)); x += moe(norm(x))`.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    pub attention: AttentionSpec,
    pub moe: MoeSpec,
}

#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// The first `rotary_dim` values of each head are rotated (rotate-half pairing); the rest pass through.
    pub rotary_dim: usize,
    pub rope_theta: f64,
    pub qk_norm: QkNorm,
}

/// RMSNorm of queries and keys before rope.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    None,
    /// One norm over each head's `head_dim` values.
    PerHead,
    /// One norm over the whole projection (all heads together): MiniMax-M2.
    WholeProjection,
}

#[derive(Clone, Debug, PartialEq)]
pub struct MoeSpec {
    pub experts: usize,
    pub top_k: usize,
    pub intermediate: usize,
    pub scoring: Scoring,
    /// A bias per expert that is added for the choice only, not to the weights.
    pub selection_bias: bool,
    /// The chosen weights are divided by their sum.
    pub renormalize: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    Sigmoid,
    Softmax,
}

/// Patterns of tensor names without the `.weight` suffix; `{layer}` and `{expert}` are filled in.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorNames {
    pub embedding: String,
    pub final_norm: String,
    pub head: String,
    pub attention_norm: String,
    pub moe_norm: String,
    pub q: String,
    pub k: String,
    pub v: String,
    pub o: String,
    pub q_norm: String,
    pub k_norm: String,
    pub gate: String,
    /// A whole tensor name: it has no `.weight` suffix.
    pub selection_bias: String,
    /// `w1` of `w2(silu(w1 x) * w3 x)`.
    pub expert_gate: String,
    /// `w3`.
    pub expert_up: String,
    /// `w2`.
    pub expert_down: String,
}

/// Fills `{layer}` and `{expert}` into a pattern of [`TensorNames`].
pub fn tensor_name(pattern: &str, layer: usize, expert: usize) -> String {
    pattern
        .replace("{layer}", &layer.to_string())
        .replace("{expert}", &expert.to_string())
}

impl AttentionSpec {
    /// Width of the query projection and of the attention output.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of the key projection, and of the value projection.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}
