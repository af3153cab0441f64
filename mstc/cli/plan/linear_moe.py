"""Linear-MoE (Sun et al., arXiv 2503.05447): decoders of basic linear attention and mixtures of experts, to plan for.

A layer is norm, linear attention, output projection; norm, router, experts. The experts have a form that is captured
whole: rows are sorted by expert and each expert takes S * top / experts of them, as many as when the router is balanced
(what the auxiliary loss of such models aims at). So shapes are static and nothing is dropped; where the router is not
balanced, rows spill over to the next expert: enough to plan by, not to train with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mstc.kernels import linear_attention


@dataclass(frozen=True)
class Sizes:
    """hidden: width; inner: width of an expert; top: experts per token; vocabulary: rows of embedding and head."""

    hidden: int
    inner: int
    layers: int
    heads: int
    experts: int
    top: int
    vocabulary: int


class Experts(nn.Module):
    """Gated MLPs, each on the rows that are sorted to it."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.count, self.top = sizes.experts, sizes.top
        self.router = nn.Linear(sizes.hidden, sizes.experts, bias=False)
        self.gate = nn.Parameter(torch.empty(sizes.experts, sizes.hidden, sizes.inner))
        self.up = nn.Parameter(torch.empty(sizes.experts, sizes.hidden, sizes.inner))
        self.down = nn.Parameter(torch.empty(sizes.experts, sizes.inner, sizes.hidden))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [B, S, D], its rows a multiple of experts / top."""
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).float().softmax(-1).topk(self.top)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        order = chosen.flatten().argsort(stable=True)
        token = order // self.top
        given = rows[token].view(self.count, -1, rows.shape[1])
        found = torch.bmm(F.silu(torch.bmm(given, self.gate)) * torch.bmm(given, self.up), self.down)
        found = found.flatten(0, 1) * weights.flatten()[order, None]
        return torch.zeros_like(rows).index_add(0, token, found).view_as(x)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.before, self.between = nn.RMSNorm(sizes.hidden), nn.RMSNorm(sizes.hidden)
        self.qkv = nn.Linear(sizes.hidden, 3 * sizes.hidden, bias=False)
        self.out = nn.Linear(sizes.hidden, sizes.hidden, bias=False)
        self.experts = Experts(sizes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p.unflatten(-1, (self.heads, -1)) for p in self.qkv(self.before(x)).chunk(3, -1))
        x = x + self.out(linear_attention(q, k, v).flatten(-2))
        mixed: Tensor = self.experts(self.between(x))
        return x + mixed


class LinearMoE(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden)
        self.head = nn.Linear(sizes.hidden, sizes.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """The mean loss of the next token; ``ids`` [B, S]."""
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))[:, :-1]
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def step(
    sizes: Sizes, tokens: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16, device: str = "meta"
) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """A training step: the loss function and its inputs; weights are as memory was."""
    with torch.device(device):
        model = LinearMoE(sizes).to(dtype).train()
        ids = torch.zeros(batch, tokens, dtype=torch.long)
    return model.__call__, [ids]
