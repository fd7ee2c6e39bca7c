"""The tiny MiniMax-M2 for training: the released architecture, all experts computed densely.

Per layer: norm, attention with RMSNorm over the whole query and key projections and a partial rope; norm,
sigmoid gate in F32, a bias that serves the choice only, weights divided by their sum, experts w2(silu(w1
x) * w3 x).
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Shape:
    """What `config.json` says of the model, under shorter names."""

    vocabulary: int = 3072
    hidden: int = 256
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 64
    rotary: int = 32
    experts: int = 16
    top_k: int = 4
    intermediate: int = 128
    theta: float = 5e6
    eps: float = 1e-6

    as_dict = asdict


class Norm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x, cos, sin):
    """Rope on the first values of each head, halves paired; the rest pass through."""
    width = cos.shape[-1]
    turned, kept = x[..., :width], x[..., width:]
    half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    return torch.cat([turned * cos + half * sin, kept], -1)


class Layer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        expert_width = shape.experts * shape.intermediate
        self.attention_norm, self.moe_norm = Norm(shape.hidden, shape.eps), Norm(shape.hidden, shape.eps)
        self.q_norm, self.k_norm = Norm(q_width, shape.eps), Norm(kv_width, shape.eps)
        self.q, self.k = nn.Linear(shape.hidden, q_width, False), nn.Linear(shape.hidden, kv_width, False)
        self.v, self.o = nn.Linear(shape.hidden, kv_width, False), nn.Linear(q_width, shape.hidden, False)
        self.gate = nn.Linear(shape.hidden, shape.experts, False)
        self.w1 = nn.Linear(shape.hidden, expert_width, False)
        self.w3 = nn.Linear(shape.hidden, expert_width, False)
        self.w2 = nn.Linear(expert_width, shape.hidden, False)
        self.register_buffer("bias", torch.zeros(shape.experts))
        #: Tokens each expert got since it was last reset, for the balance.
        self.register_buffer("load", torch.zeros(shape.experts))

    def forward(self, x, cos, sin, cache=None):
        x = x + self.attend(self.attention_norm(x), cos, sin, cache)
        return x + self.mix_experts(self.moe_norm(x))

    def attend(self, h, cos, sin, cache):
        shape = self.shape
        batch, tokens, _ = h.shape
        q = self.q_norm(self.q(h)).view(batch, tokens, shape.heads, shape.head_dim).transpose(1, 2)
        k = self.k_norm(self.k(h)).view(batch, tokens, shape.kv_heads, shape.head_dim).transpose(1, 2)
        v = self.v(h).view(batch, tokens, shape.kv_heads, shape.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache[0], k], 2), torch.cat([cache[1], v], 2)
            cache[:] = [k, v]
        group = shape.heads // shape.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=tokens > 1)
        return self.o(out.transpose(1, 2).reshape(batch, tokens, shape.heads * shape.head_dim))

    def mix_experts(self, h):
        shape = self.shape
        batch, tokens, _ = h.shape
        with torch.autocast("cuda", enabled=False):
            score = torch.sigmoid(F.linear(h.float(), self.gate.weight.float()))
        chosen = (score + self.bias).topk(shape.top_k, -1).indices
        mask = torch.zeros_like(score).scatter(-1, chosen, 1.0)
        weight = score * mask
        weight = weight / weight.sum(-1, keepdim=True)
        if self.training:
            self.load.add_(mask.sum((0, 1)).detach())
        inner = (F.silu(self.w1(h)) * self.w3(h)).view(batch, tokens, shape.experts, shape.intermediate)
        inner = inner * weight[..., None].to(h.dtype)
        return self.w2(inner.reshape(batch, tokens, -1))


class Model(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)
        self.head = nn.Linear(shape.hidden, shape.vocabulary, False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, 0, self.initial_deviation(name, parameter))

    def initial_deviation(self, name, parameter):
        if "embedding" in name:
            return 0.02
        if name.endswith("w2.weight"):
            return 0.25 * self.shape.intermediate**-0.5
        return 0.5 * parameter.shape[-1] ** -0.5

    def rope(self, begin, end, device):
        """Cosines and sines of the positions `begin..end`: [tokens, rotary]."""
        exponents = torch.arange(0, self.shape.rotary, 2, device=device).float() / self.shape.rotary
        frequencies = 1 / (self.shape.theta**exponents)
        angles = torch.arange(begin, end, device=device).float()[:, None] * frequencies
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()

    def forward(self, ids, start=0, caches=None):
        """Logits [batch, tokens, vocabulary]; `caches`, one list per layer, are read and extended."""
        cos, sin = self.rope(start, start + ids.shape[1], ids.device)
        x = self.embedding(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, None if caches is None else caches[i])
        return self.head(self.norm(x))
