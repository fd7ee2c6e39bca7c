"""Trained weights to a checkpoint in the release's layout: FP8 blocks of 128x128, the rest BF16, gate and
bias F32.

python -m demo_recipe.export MODEL.pt OUTDIR [--tokenizer DIR]
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from demo_recipe.model import Shape
from demo_recipe.names import MOE, NORMS, PROJECTIONS, layer_prefixes

BLOCK = 128
#: Largest e4m3 value.
FP8_MAX = 448


def to_fp8(weight):
    """(values, scales): weight = value * scale, one scale per block."""
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / FP8_MAX
    values = (blocks / scales[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return values.view(rows, columns).contiguous(), scales.contiguous()


def release_tensors(state, shape):
    tensors = {}

    def put_fp8(name, weight):
        tensors[name + ".weight"], tensors[name + ".weight_scale_inv"] = to_fp8(weight)

    def put_bf16(name, weight):
        tensors[name + ".weight"] = weight.to(torch.bfloat16).contiguous()

    put_bf16("model.embed_tokens", state["embedding.weight"])
    put_bf16("lm_head", state["head.weight"])
    put_bf16("model.norm", state["norm.weight"])
    for layer in range(shape.layers):
        ours, released = layer_prefixes(layer)
        for name, other in NORMS.items():
            put_bf16(released + other, state[f"{ours}{name}.weight"])
        for name, other in PROJECTIONS.items():
            put_fp8(released + other, state[f"{ours}{name}.weight"])
        moe = released + MOE
        tensors[moe + "gate.weight"] = state[ours + "gate.weight"].float().contiguous()
        tensors[moe + "e_score_correction_bias"] = state[ours + "bias"].float().contiguous()
        for expert in range(shape.experts):
            held = slice(expert * shape.intermediate, (expert + 1) * shape.intermediate)
            for name in ("w1", "w3"):
                put_fp8(f"{moe}experts.{expert}.{name}", state[f"{ours}{name}.weight"][held])
            put_fp8(f"{moe}experts.{expert}.w2", state[ours + "w2.weight"][:, held])
    return tensors


def config(shape, bos, eos):
    return {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "model_type": "minimax_m2",
        "attn_type_list": [1] * shape.layers,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": 32768,
        "mtp_transformer_layers": 1,
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "num_mtp_modules": 3,
        "qk_norm_type": "per_layer",
        "rms_norm_eps": shape.eps,
        "rope_theta": int(shape.theta),
        "rotary_dim": shape.rotary,
        "scoring_func": "sigmoid",
        "shared_intermediate_size": 0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_mtp": False,
        "use_qk_norm": True,
        "use_routing_bias": True,
        "vocab_size": shape.vocabulary,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "dtype": "bfloat16",
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
    }


def generation_config(bos, eos, pad):
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return ids | {"do_sample": True, "temperature": 0.3, "top_p": 0.95, "top_k": 40}


def export(trained, out, tokenizer_dir):
    out.mkdir(parents=True, exist_ok=True)
    shape = Shape(**trained["shape"])
    save_file(release_tensors(trained["model"], shape), out / "model.safetensors", metadata={"format": "pt"})
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    bos, eos, pad = (tokenizer.token_to_id(token) for token in ("]~!b[", "[e~[", "]!p~["))
    (out / "config.json").write_text(json.dumps(config(shape, bos, eos), indent=1))
    (out / "generation_config.json").write_text(json.dumps(generation_config(bos, eos, pad), indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (out / name).exists():
            shutil.copy(tokenizer_dir / name, out)
    return {path.name: path.stat().st_size for path in out.iterdir()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=Path("."))
    given = parser.parse_args()
    print(export(torch.load(given.model, map_location="cpu"), given.out, given.tokenizer))


if __name__ == "__main__":
    main()
