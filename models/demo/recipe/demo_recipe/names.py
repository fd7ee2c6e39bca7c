"""Names of the released checkpoint's tensors beside those of the training model."""

#: Training model's module -> released name, within a layer.
NORMS = {
    "attention_norm": "input_layernorm",
    "moe_norm": "post_attention_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
PROJECTIONS = {name: f"self_attn.{name}_proj" for name in "qkvo"}
MOE = "block_sparse_moe."


def layer_prefixes(layer):
    """(training, released)"""
    return f"layers.{layer}.", f"model.layers.{layer}."
