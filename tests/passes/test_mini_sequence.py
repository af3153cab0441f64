"""Loops that hold attention as well: over few keys of each token, computed again with the rest."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from testkit.allocator import measured_peak
from testkit.exactness import Comparison, chunked, compare
from testkit.hf_models import tokens
from testkit.shares import first_of
from testkit.stacks import MLP, Attention, AttentionResidual

WIDTH, VOCABULARY = 16, 50
SDPA = torch.ops.aten.scaled_dot_product_attention.default


class Fields(nn.Module):
    """A table: attention among the fields of each row, then among the rows of each field."""

    def __init__(self, flat: bool, masked: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 3)
        self.fields, self.rows, self.mlp = Attention(WIDTH), Attention(WIDTH), MLP(WIDTH)
        self.flat, self.masked = flat, masked

    def forward(self, table: Tensor, classes: Tensor) -> Tensor:
        x = self.embed(table[..., None])  # [B, rows, fields, width]
        mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril() if self.masked else None
        x = self.along(self.fields, x, mask)
        x = self.along(self.rows, x.transpose(1, 2), None).transpose(1, 2)
        return F.cross_entropy(self.head(self.mlp(x).mean(2)).flatten(0, 1), classes.flatten())

    def along(self, attention: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        return attention(x.flatten(0, 1), mask).view_as(x) if self.flat else attention(x, mask)  # type: ignore[no-any-return]


class Latents(nn.Module):
    """Every token asks eight values, which are parameters or made of all tokens."""

    def __init__(self, made: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.attention, self.mlp = Attention(WIDTH, True), MLP(WIDTH)
        self.query, self.pair = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.latents, self.made = nn.Parameter(torch.randn(8, WIDTH)), made

    def forward(self, ids: Tensor) -> Tensor:
        x = self.attention(self.embed(ids))
        latents = self.latents.expand(len(ids), -1, -1)
        if self.made:
            latents = F.scaled_dot_product_attention(latents, x, x)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.query(x), *self.pair(latents).chunk(2, -1)))
        asked = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return F.cross_entropy(self.head(self.mlp(x + asked)).flatten(0, 1), ids.roll(-1, 1).flatten())


def table() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 37, 6, generator=generator).double(), torch.randint(0, 3, (2, 37), generator=generator)


def ids() -> tuple[Tensor]:
    return (tokens(2, 23, VOCABULARY),)


# What attends, its arguments, and the attentions that stay outside of loops: those over tokens or rows.
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]], int]] = {
    "layers": (lambda: AttentionResidual(3, WIDTH, VOCABULARY), ids, 3),
    "fields": (lambda: Fields(flat=False, masked=False), table, 1),
    "fields-masked": (lambda: Fields(flat=False, masked=True), table, 1),
    "fields-flat": (lambda: Fields(flat=True, masked=False), table, 1),
    "latents": (lambda: Latents(made=False), ids, 1),
    "latents-of-tokens": (lambda: Latents(made=True), ids, 2),
}


def compared(kind: str, lower: str) -> Comparison:
    torch.manual_seed(0)
    make, arguments, _ = MODELS[kind]
    model = make().double()
    return compare(model, dict(model.named_parameters()), arguments(), chunked(7, 5, lower=lower))


@pytest.mark.parametrize("kind", MODELS)
def test_attention_over_few_keys_runs_in_loops(kind: str) -> None:
    result = compared(kind, "aot_eager")
    result.check()
    outside = [n for gm in result.graphs for n in gm.graph.find_nodes(op="call_function", target=SDPA)]
    assert len(outside) == MODELS[kind][2]
    assert "attention over few keys" in result.describe()


@pytest.mark.parametrize("kind", first_of(["layers", "fields-flat"], ["fields-flat"]))
def test_through_inductor(kind: str) -> None:
    compared(kind, "inductor").check()


def test_outputs_of_all_layers_are_held_once() -> None:
    """Stacked and normed for every layer that reads them, they would be held depth times over."""

    def peak(backend: str, **options: object) -> int:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = AttentionResidual(6, 32, VOCABULARY)
        step = torch.compile(model, backend=backend, options={"lower": "aot_eager", **options} if options else None)
        batch = tokens(1, 2048, VOCABULARY)
        step(batch).backward()
        return measured_peak(lambda: step(batch).backward(), model)

    assert peak("mstc", **chunked(256, 256)) < 0.4 * peak("aot_eager")
