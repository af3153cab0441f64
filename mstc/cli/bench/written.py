"""A small decoder whose attention is written out as matmul, softmax, matmul, in the ways that people do."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["KINDS", "WrittenDecoder"]

# nanoGPT; a softcap as Gemma 2; ALiBi; a learned bias for each distance; T5's relative positions.
KINDS = ("plain", "softcap", "alibi", "bias", "t5")

_SOFTCAP = 50.0
_FARTHEST = 128  # distances from here on share the last bucket, and the last learned bias
_BUCKETS = 32  # half of them for each distance below 16, half spaced by logarithms


def _bucket(distance: Tensor) -> Tensor:
    near = _BUCKETS // 2
    scale = (_BUCKETS - near) / math.log(_FARTHEST / near)
    far = near + (torch.log(distance.clamp(min=1).float() / near) * scale).long()
    return torch.where(distance < near, distance, far.clamp(max=_BUCKETS - 1))


class _Attention(nn.Module):
    slopes: Tensor

    def __init__(self, kind: str, width: int, heads: int) -> None:
        super().__init__()
        self.kind, self.heads = kind, heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("slopes", 2.0 ** -(8.0 * torch.arange(1, heads + 1) / heads), persistent=False)

    def forward(self, x: Tensor, table: Tensor | None) -> Tensor:
        b, t, c = x.shape
        q, k, v = (y.view(b, t, self.heads, c // self.heads).transpose(1, 2) for y in self.qkv(x).split(c, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        if self.kind == "softcap":
            scores = torch.tanh(scores / _SOFTCAP) * _SOFTCAP
        position = torch.arange(t, device=x.device)
        distance = position[:, None] - position[None, :]
        if self.kind == "alibi":
            scores = scores - self.slopes.view(1, -1, 1, 1) * distance
        if table is not None:
            index = distance.clamp(0, _FARTHEST - 1) if self.kind == "bias" else _bucket(distance.clamp(min=0))
            scores = scores + F.embedding(index, table).permute(2, 0, 1)
        mask = torch.tril(torch.ones(t, t, device=x.device)).view(1, 1, t, t)
        scores = scores.masked_fill(mask == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        out: Tensor = self.out(y.transpose(1, 2).contiguous().view(b, t, c))
        return out


class WrittenDecoder(nn.Module):
    """Layers of norm, attention and residual sum, called as Hugging Face's models are."""

    def __init__(self, kind: str, width: int, layers: int, heads: int, vocab: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab, width), nn.Linear(width, vocab, bias=False)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))
        self.layers = nn.ModuleList(_Attention(kind, width, heads) for _ in range(layers))
        rows = {"bias": _FARTHEST, "t5": _BUCKETS}.get(kind)
        self.table = None if rows is None else nn.Parameter(torch.randn(rows, heads) * 0.02)

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        x = self.embed(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(norm(x), self.table)
        logits = self.head(self.norms[-1](x))
        return SimpleNamespace(loss=F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()))
