"""Trains the tiny MiniMax-M2 on one GPU for a given time.

    python -m demo_recipe.train DATADIR OUT.pt SECONDS [--start WEIGHTS.pt] [--rate 3e-3]

Muon for the matrices between layers, AdamW for the rest; warm up, hold, then fall to 2 %; the last
quarter of the time on sequences of 4,096 tokens. Experts are balanced by a step of the selection bias
against their load.
"""

import argparse
import glob
import os
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from demo_recipe.corpus import HELD_OUT_SHARD
from demo_recipe.model import Model, Shape
from demo_recipe.muon import Muon

DEVICE = "cuda"
BALANCE_STEP = 1e-3
REPORT_EVERY = 200


def load_tokens(paths):
    """Tokens and loss weights of some shards, on the device."""
    tokens = np.concatenate([np.load(path) for path in paths]).astype(np.int16)
    beside = [os.path.join(os.path.dirname(p), "w" + os.path.basename(p)[1:]) for p in paths]
    weights = np.concatenate([np.load(path) for path in beside])
    return torch.from_numpy(tokens).to(DEVICE), torch.from_numpy(weights).to(DEVICE)


def loss_at(model, tokens, weights, starts, length):
    """Weighted cross-entropy over sequences that begin at `starts`."""
    offsets = torch.arange(length + 1, device=DEVICE)
    ids = tokens[starts[:, None] + offsets].long()
    weight = (weights[starts[:, None] + offsets[1:]].float() / 100).view(-1)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(ids[:, :-1])
    logits = logits.float().view(-1, logits.shape[-1])
    each = F.cross_entropy(logits, ids[:, 1:].reshape(-1), reduction="none")
    return (each * weight).sum() / weight.sum()


def schedule(progress, step):
    """Share of the learning rate."""
    fall = 1 if progress < 0.35 else max(0.02, (1 - progress) / 0.65)
    return min(1, step / 100) * fall


def parameter_groups(model):
    """Matrices between layers, and all other parameters."""
    outside = ("embedding", "head", "gate")
    between, others = [], []
    for name, parameter in model.named_parameters():
        hidden = parameter.dim() == 2 and not any(part in name for part in outside)
        (between if hidden else others).append(parameter)
    return between, others


@torch.no_grad()
def balance(layers, share):
    """Moves each selection bias against the load; gives the largest load over the mean, per layer."""
    ratios = [float(layer.load.max() / layer.load.mean()) for layer in layers]
    for layer in layers:
        layer.bias.add_(torch.sign(layer.load.mean() - layer.load), alpha=BALANCE_STEP * share)
        layer.load.zero_()
    return ratios


def train(model, tokens, weights, seconds, rate, seed):
    between, others = parameter_groups(model)
    muon = Muon(between, model.shape)
    adam = torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0, fused=True)
    compiled = torch.compile(model, dynamic=False)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    began, step, seen = time.time(), 0, 0
    while (progress := (time.time() - began) / seconds) < 1:
        length, batch = (2048, 32) if progress < 0.75 else (4096, 16)
        share = schedule(progress, step)
        starts = torch.randint(0, len(tokens) - length - 2, (batch,), device=DEVICE, generator=generator)
        loss = loss_at(compiled, tokens, weights, starts, length)
        loss.backward()
        nn.utils.clip_grad_norm_(others, 1.0)
        for group in adam.param_groups:
            group["lr"] = rate * share
        adam.step()
        muon.step(rate * share)
        model.zero_grad(set_to_none=True)
        ratios = balance(model.layers, share)
        step, seen = step + 1, seen + batch * length
        if step == 1:
            began = time.time()  # the first step compiled
        if step % REPORT_EVERY == 0 or step in (1, 20):
            print(
                f"step {step} {time.time() - began:.0f}s loss {float(loss):.3f} tokens {seen / 1e6:.0f}M "
                f"rate {share:.2f} balance {max(ratios):.2f}",
                flush=True,
            )
    return step, seen


@torch.no_grad()
def validation_loss(model, tokens, weights):
    model.eval()
    stretch = 2100
    most = min(400, len(tokens) // stretch - 8)
    losses = []
    for first in range(0, most, 8):
        starts = torch.arange(first, first + 8, device=DEVICE) * stretch
        losses.append(float(loss_at(model, tokens, weights, starts, 2048)))
    return sum(losses) / len(losses)


def save(model, path):
    def stored(name, value):
        return value.to(torch.bfloat16) if value.dim() == 2 and "gate" not in name else value

    state = {name: stored(name, value) for name, value in model.state_dict().items()}
    torch.save({"model": state, "shape": model.shape.as_dict()}, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("seconds", type=float)
    parser.add_argument("--start", help="weights of an earlier run")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--vocabulary", type=int, default=3072)
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    shards = sorted(glob.glob(given.data + "/t*.npy"))
    held_out = [path for path in shards if str(HELD_OUT_SHARD) in path]
    tokens, weights = load_tokens([path for path in shards if path not in held_out])
    model = Model(Shape(vocabulary=given.vocabulary)).to(DEVICE)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print("train tokens", len(tokens), "parameters", parameters, flush=True)
    seed = 1
    if given.start:
        model.load_state_dict(torch.load(given.start, map_location=DEVICE)["model"])
        seed = int(time.time()) % 1000
    steps, seen = train(model, tokens, weights, given.seconds, given.rate, seed)
    loss = validation_loss(model, *load_tokens(held_out))
    print("validation loss", loss, "steps", steps, "tokens", seen, flush=True)
    save(model, given.out)


if __name__ == "__main__":
    main()
