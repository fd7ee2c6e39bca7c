"""Reference of a checkpoint through transformers, F32 on dequantised weights.

    python -m demo_recipe.make_reference CHECKPOINT OUT.safetensors

Writes input_ids [P], logits [P, vocabulary], greedy_ids [64] (eos ignored) and router_logits.L [P, experts].
"""

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import MiniMaxM2Config, MiniMaxM2ForCausalLM

from demo_recipe import render
from demo_recipe.checkpoint import Checkpoint, Tensors
from demo_recipe.coding.task import draw_task

PROMPT_TOKENS = 256
GREEDY_TOKENS = 64


def load_transformers(directory):
    config = json.loads((Path(directory) / "config.json").read_text())
    config.pop("quantization_config", None)
    wanted = MiniMaxM2Config.from_dict(config)
    wanted._attn_implementation = wanted._experts_implementation = "eager"
    model = MiniMaxM2ForCausalLM(wanted).float().eval()
    tensors = Tensors(directory)
    model.load_state_dict({name: state_tensor(tensors, name, config) for name in model.state_dict()})
    return model


def state_tensor(tensors, name, config):
    """A tensor of transformers' model, which stacks the experts."""
    stored = name.replace(".mlp.", ".block_sparse_moe.")
    experts = range(config["num_local_experts"])
    if stored.endswith("experts.gate_up_proj"):
        base = stored.removesuffix("gate_up_proj")
        pairs = ((tensors.weight(f"{base}{e}.w1"), tensors.weight(f"{base}{e}.w3")) for e in experts)
        return torch.stack([torch.cat(pair) for pair in pairs])
    if stored.endswith("experts.down_proj"):
        base = stored.removesuffix("down_proj")
        return torch.stack([tensors.weight(f"{base}{e}.w2") for e in experts])
    if stored.endswith("e_score_correction_bias"):
        return tensors.stored[stored]
    return tensors.weight(stored.removesuffix(".weight"))


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("out")
    given = parser.parse_args()
    ours, theirs = Checkpoint(given.checkpoint), load_transformers(given.checkpoint)
    task = draw_task(random.Random(5))
    ids = ours.encode(render.prompt([{"role": "user", "content": task.prompt}]))[:PROMPT_TOKENS]
    prompt = torch.tensor([ids])
    output = theirs(prompt, output_router_logits=True, use_cache=False)
    greedy = theirs.generate(
        prompt,
        max_new_tokens=GREEDY_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        use_mtp=False,
    )[0, len(ids) :]
    logits = output.logits[0].float().contiguous()
    difference = float((ours.model(prompt)[0] - logits).norm() / logits.norm())
    own = ours.generate(ids, GREEDY_TOKENS)
    print(len(ids), "relative", difference, "greedy equal", own == greedy.tolist()[: len(own)])
    reference = {"input_ids": torch.tensor(ids), "logits": logits, "greedy_ids": greedy.contiguous()}
    for layer, router_logits in enumerate(output.router_logits):
        reference[f"router_logits.{layer}"] = router_logits.float().contiguous()
    save_file(reference, given.out)
    print({name: tuple(tensor.shape) for name, tensor in reference.items()})


if __name__ == "__main__":
    main()
