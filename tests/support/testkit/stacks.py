"""Stacks of layers that are wired in other ways than one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HEADS = 2


class Attention(nn.Module):
    """x [..., S, width] with a residual path; ``mask`` [S, S]."""

    def __init__(self, width: int, causal: bool = False) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.causal = causal

    def forward(self, x: Tensor, mask: Tensor | None = None, pair: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``pair``: keys and values of another layer."""
        q, k, v = self.heads(x)
        k, v = (k, v) if pair is None else pair
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return x + self.out(mixed.transpose(-2, -3).flatten(-2))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k and v [..., heads, S, width / heads]."""
        return self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).transpose(-4, -2).unbind(-3)  # type: ignore[no-any-return]


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(width, True), MLP(width)

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.mlp(self.attention(x, None, pair))  # type: ignore[no-any-return]


def _unet(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """The second half of the layers reads what the first half made, the last first."""
    skips: list[Tensor] = []
    for i, layer in enumerate(layers):
        first = 2 * i < len(layers)
        x = layer(x if first else x + skips.pop())
        if first:
            skips.append(x)
    return x


def _dense(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """Each layer reads the mean of all before it."""
    made = [x]
    for layer in layers:
        made.append(layer(torch.stack(made).mean(0)))
    return made[-1]


def _keys(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """All layers attend to the first one's keys and values."""
    _, *pair = layers[0].attention.heads(x)  # type: ignore[union-attr, operator]
    for layer in layers:
        x = layer(x, tuple(pair))
    return x


def _again(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """The first layer as often as there are layers."""
    for _ in layers:
        x = layers[0](x)
    return x


def _half_frozen(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for i, layer in enumerate(layers):
        x = layer(x) if 2 * i >= len(layers) else layer(x).detach()
    return x


WIRINGS: dict[str, Callable[[nn.ModuleList, Tensor], Tensor]] = {
    "unet": _unet,
    "dense": _dense,
    "keys": _keys,
    "again": _again,
    "half-frozen": _half_frozen,
}


class Stack(nn.Module):
    """A language model whose layers are wired as `WIRINGS` has it; ids [B, S] to the loss."""

    def __init__(self, wiring: str, layers: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.layers = nn.ModuleList(Layer(width) for _ in range(1 if wiring == "again" else layers))
        self.wired, self.times = WIRINGS[wiring], layers if wiring == "again" else 1

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wired(nn.ModuleList(list(self.layers) * self.times), self.embed(ids))
        return F.cross_entropy(self.head(x).flatten(0, 1), ids.roll(-1, 1).flatten())


class AttentionResidual(nn.Module):
    """Each layer reads, per token, what it attends to among the outputs of all layers before it."""

    def __init__(self, layers: int, width: int, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))
        self.queries = nn.Parameter(torch.randn(layers + 1, width))

    def forward(self, ids: Tensor) -> Tensor:
        states = [self.embed(ids)]
        for query, layer in zip(self.queries, self.layers, strict=False):
            states.append(layer(self.read(query, states)))
        scores = self.head(self.read(self.queries[-1], states))
        return F.cross_entropy(scores.flatten(0, 1), ids.roll(-1, 1).flatten())

    def read(self, query: Tensor, states: list[Tensor]) -> Tensor:
        stacked = F.rms_norm(torch.stack(states, -2), states[0].shape[-1:])
        asked = query.expand(*stacked.shape[:-2], 1, -1)
        return F.scaled_dot_product_attention(asked, stacked, stacked).squeeze(-2)
