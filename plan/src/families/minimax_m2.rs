//! MiniMax-M2, M2.5 and M2.7: one architecture.
//!
//! Every layer is full attention with an RMSNorm over the whole query and key projections and a partial rope,
//! then experts chosen by sigmoid plus a bias that serves the choice only; no shared expert. The config announces
//! MTP modules that no released checkpoint holds: they are not read.

use serde_json::{Value, json};

use crate::error::Result;
use crate::fields::Fields;
use crate::limits::{
    MAX_EOS_IDS, MAX_EXPERTS, MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_POSITION, MAX_TOP_K, MAX_VOCAB,
    MAX_WIDTH,
};
use crate::model::{AttentionSpec, LayerSpec, ModelSpec, MoeSpec, QkNorm, Scoring, TensorNames};

pub(super) fn read(fields: &Fields<'_>) -> Result<ModelSpec> {
    fields.only("model_type", &json!("minimax_m2"))?;
    fields.only("hidden_act", &json!("silu"))?;
    fields.only("shared_intermediate_size", &json!(0))?;
    fields.only("attention_bias", &json!(false))?;
    fields.only("routed_scaling_factor", &json!(1.0))?;
    if fields.flag("use_sliding_window", false)? {
        return Err(fields.error("use_sliding_window", "not supported", "only full attention is"));
    }
    let hidden = fields.required_integer("hidden_size", 1..=MAX_WIDTH)?;
    let vocab = fields.required_integer("vocab_size", 1..=MAX_VOCAB)?;
    let layers = fields.required_integer("num_hidden_layers", 1..=MAX_LAYERS)?;
    full_attention_only(fields, layers)?;
    let layer = LayerSpec {
        attention: attention(fields, hidden)?,
        moe: moe(fields)?,
    };
    let tied = fields.flag("tie_word_embeddings", false)?;
    Ok(ModelSpec {
        family: "minimax_m2".into(),
        hidden,
        vocab,
        rms_eps: fields.number("rms_norm_eps", 0.0, 1.0)?.unwrap_or(1e-6) as f32,
        max_position: fields.required_integer("max_position_embeddings", 1..=MAX_POSITION)?,
        layers: vec![layer; layers],
        eos_token_ids: eos_token_ids(fields, vocab)?,
        bos_token_id: fields.integer("bos_token_id", 0..=vocab - 1)?.map(|id| id as u32),
        names: tensor_names(tied),
    })
}

fn attention(fields: &Fields<'_>, hidden: usize) -> Result<AttentionSpec> {
    let heads = fields.required_integer("num_attention_heads", 1..=MAX_HEADS)?;
    let kv_heads = fields
        .integer("num_key_value_heads", 1..=MAX_HEADS)?
        .unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(fields.error(
            "num_key_value_heads",
            format!("it does not divide num_attention_heads {heads}"),
            "correct one of the two",
        ));
    }
    let head_dim = match fields.integer("head_dim", 2..=MAX_HEAD_DIM)? {
        Some(head_dim) => head_dim,
        None if hidden.is_multiple_of(heads) && hidden / heads <= MAX_HEAD_DIM => hidden / heads,
        None => {
            return Err(fields.error(
                "head_dim",
                format!("hidden_size {hidden} over num_attention_heads {heads} is no whole number up to {MAX_HEAD_DIM}"),
                "add head_dim",
            ));
        }
    };
    if heads * head_dim > MAX_WIDTH {
        return Err(fields.error(
            "num_attention_heads",
            format!("with head_dim {head_dim} the query projection is wider than {MAX_WIDTH}"),
            "correct one of the two",
        ));
    }
    let (rope_theta, rotary_dim) = rope(fields, head_dim)?;
    Ok(AttentionSpec {
        heads,
        kv_heads,
        head_dim,
        rotary_dim,
        rope_theta,
        qk_norm: qk_norm(fields)?,
    })
}

/// Theta and rotary width, from the top level (as released) or from `rope_parameters` (as newer tools save it).
fn rope(fields: &Fields<'_>, head_dim: usize) -> Result<(f64, usize)> {
    fields.only("rope_scaling", &Value::Null)?;
    let nested = fields.object("rope_parameters")?;
    let place = nested.as_ref().unwrap_or(fields);
    if nested.is_some() {
        place.only("rope_type", &json!("default"))?;
    }
    let theta = match place.number("rope_theta", 0.0, 1e12)? {
        Some(theta) => theta,
        None => fields.number("rope_theta", 0.0, 1e12)?.ok_or_else(|| {
            fields.error(
                "rope_theta",
                "a number is needed",
                "take it from the published config.json",
            )
        })?,
    };
    let rotary_dim = match fields.integer("rotary_dim", 2..=MAX_HEAD_DIM)? {
        Some(rotary_dim) => rotary_dim,
        None => {
            let factor = place.number("partial_rotary_factor", 0.0, 1.0)?.unwrap_or(1.0);
            (head_dim as f64 * factor) as usize
        }
    };
    if rotary_dim > head_dim || rotary_dim == 0 || rotary_dim % 2 != 0 {
        return Err(fields.error(
            "rotary_dim",
            format!("it (or head_dim times partial_rotary_factor: {rotary_dim}) must be even and at most head_dim {head_dim}"),
            "take it from the published config.json",
        ));
    }
    Ok((theta, rotary_dim))
}

fn qk_norm(fields: &Fields<'_>) -> Result<QkNorm> {
    if !fields.flag("use_qk_norm", true)? {
        return Ok(QkNorm::None);
    }
    match fields.text("qk_norm_type")? {
        None | Some("per_layer") => Ok(QkNorm::WholeProjection),
        Some("per_head") => Ok(QkNorm::PerHead),
        Some(_) => Err(fields.error("qk_norm_type", "not supported", "supported: per_layer, per_head")),
    }
}

fn moe(fields: &Fields<'_>) -> Result<MoeSpec> {
    let experts = fields.required_integer("num_local_experts", 1..=MAX_EXPERTS)?;
    let top_k = fields.required_integer("num_experts_per_tok", 1..=MAX_TOP_K)?;
    if top_k > experts {
        return Err(fields.error(
            "num_experts_per_tok",
            format!("it is above num_local_experts {experts}"),
            "correct one of the two",
        ));
    }
    let scoring = match fields.text("scoring_func")? {
        None | Some("sigmoid") => Scoring::Sigmoid,
        Some("softmax") => Scoring::Softmax,
        Some(_) => {
            return Err(fields.error("scoring_func", "not supported", "supported: sigmoid, softmax"));
        }
    };
    Ok(MoeSpec {
        experts,
        top_k,
        intermediate: fields.required_integer("intermediate_size", 1..=MAX_WIDTH)?,
        scoring,
        selection_bias: fields.flag("use_routing_bias", true)?,
        renormalize: fields.flag("norm_topk_prob", true)?,
    })
}

/// `attn_type_list` must say full attention (1) for every layer.
fn full_attention_only(fields: &Fields<'_>, layers: usize) -> Result<()> {
    let name = "attn_type_list";
    let Some(value) = fields.get(name) else {
        return Ok(());
    };
    let Some(list) = value.as_array() else {
        return Err(fields.error(name, "it must be a list", "correct or remove it"));
    };
    if list.len() != layers {
        let problem = format!("it has {} entries for num_hidden_layers {layers}", list.len());
        return Err(fields.error(name, problem, "correct one of the two"));
    }
    match list.iter().position(|kind| kind.as_u64() != Some(1)) {
        None => Ok(()),
        Some(layer) => Err(fields.error(
            name,
            format!("layer {layer} is of another kind than 1 (full attention)"),
            "only full attention is supported",
        )),
    }
}

/// One id or a list of ids, all below the vocabulary.
fn eos_token_ids(fields: &Fields<'_>, vocab: usize) -> Result<Vec<u32>> {
    let name = "eos_token_id";
    let ids: Vec<Option<u64>> = match fields.get(name) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= MAX_EOS_IDS => list.iter().map(Value::as_u64).collect(),
        Some(value) => vec![value.as_u64()],
    };
    ids.into_iter()
        .map(|id| match id {
            Some(id) if id < vocab as u64 => Ok(id as u32),
            _ => Err(fields.error(
                name,
                format!("it must be a token id below vocab_size {vocab}, or a list of at most {MAX_EOS_IDS} of them"),
                "take it from the published config.json",
            )),
        })
        .collect()
}

fn tensor_names(tied: bool) -> TensorNames {
    let layer = |rest: &str| format!("model.layers.{{layer}}.{rest}");
    let expert = |w: &str| layer(&format!("block_sparse_moe.experts.{{expert}}.{w}"));
    let embedding = "model.embed_tokens".to_owned();
    TensorNames {
        head: if tied { embedding.clone() } else { "lm_head".into() },
        embedding,
        final_norm: "model.norm".into(),
        attention_norm: layer("input_layernorm"),
        moe_norm: layer("post_attention_layernorm"),
        q: layer("self_attn.q_proj"),
        k: layer("self_attn.k_proj"),
        v: layer("self_attn.v_proj"),
        o: layer("self_attn.o_proj"),
        q_norm: layer("self_attn.q_norm"),
        k_norm: layer("self_attn.k_norm"),
        gate: layer("block_sparse_moe.gate"),
        selection_bias: layer("block_sparse_moe.e_score_correction_bias"),
        expert_gate: expert("w1"),
        expert_up: expert("w3"),
        expert_down: expert("w2"),
    }
}
