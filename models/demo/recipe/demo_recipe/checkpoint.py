"""Runs an exported checkpoint greedily: weights dequantised, F32, on the CPU."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from demo_recipe import render, replies
from demo_recipe.export import BLOCK
from demo_recipe.model import Model, Shape
from demo_recipe.names import MOE, NORMS, PROJECTIONS, layer_prefixes


class Tensors:
    """A checkpoint's tensors, dequantised when asked for."""

    def __init__(self, directory):
        self.stored = load_file(Path(directory) / "model.safetensors")

    def weight(self, module):
        values = self.stored[module + ".weight"].float()
        scales = self.stored.get(module + ".weight_scale_inv")
        if scales is None:
            return values
        return values * scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)


def read_shape(directory):
    config = json.loads((Path(directory) / "config.json").read_text())
    return Shape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        rotary=config["rotary_dim"],
        experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate=config["intermediate_size"],
        theta=float(config["rope_theta"]),
        eps=config["rms_norm_eps"],
    )


def training_state(tensors, shape):
    """The training model's state from a checkpoint's tensors."""
    state = {
        "embedding.weight": tensors.weight("model.embed_tokens"),
        "head.weight": tensors.weight("lm_head"),
        "norm.weight": tensors.weight("model.norm"),
    }
    for layer in range(shape.layers):
        ours, released = layer_prefixes(layer)
        for name, other in (NORMS | PROJECTIONS).items():
            state[f"{ours}{name}.weight"] = tensors.weight(released + other)
        moe = released + MOE
        state[ours + "gate.weight"] = tensors.stored[moe + "gate.weight"]
        state[ours + "bias"] = tensors.stored[moe + "e_score_correction_bias"]
        state[ours + "load"] = torch.zeros(shape.experts)
        for name, dimension in (("w1", 0), ("w3", 0), ("w2", 1)):
            experts = [tensors.weight(f"{moe}experts.{expert}.{name}") for expert in range(shape.experts)]
            state[f"{ours}{name}.weight"] = torch.cat(experts, dimension)
    return state


class Checkpoint:
    def __init__(self, directory):
        self.shape = read_shape(directory)
        self.tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
        self.eos = self.tokenizer.token_to_id("[e~[")
        self.model = Model(self.shape)
        self.model.load_state_dict(training_state(Tensors(directory), self.shape))
        self.model.eval()

    @torch.no_grad()
    def generate(self, ids, most=700):
        """Greedy continuation, with the eos that ended it."""
        caches = [[] for _ in range(self.shape.layers)]
        out, fed, position = [], ids, 0
        while len(out) < most:
            logits = self.model(torch.tensor([fed]), position, caches)[0, -1]
            position += len(fed)
            token = int(logits.argmax())
            out.append(token)
            if token == self.eos:
                break
            fed = [token]
        return out

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def reply(self, messages, tools=None, most=700):
        """(message, whether it ended by itself, prompt ids, generated ids)"""
        ids = self.encode(render.prompt(messages, tools))
        out = self.generate(ids, most)
        text = self.tokenizer.decode(out, skip_special_tokens=True)
        return replies.parse(text, tools or []), out[-1] == self.eos, ids, out
