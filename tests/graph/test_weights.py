"""Weights that are computed in the graph, of parameters and buffers alone: products with them belong to layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mstc.graph.axes import Axes
from mstc.graph.weights import Weights, made_of_weights, stack_of
from testkit.capture import node, normal_graph, randn, regions_of
from testkit.exactness import chunked, compare, products_outside
from testkit.tiny import Tiny, inputs

aten = torch.ops.aten


class Head(nn.Module):
    """Scores of classes by a weight that is computed."""

    scale: Tensor

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.trunk, self.kind = Tiny(bias=False), kind
        self.down, self.up = (nn.Parameter(randn(*s)) for s in ((2, 8), (11, 2)))
        self.register_buffer("scale", torch.rand(11, 1, dtype=torch.float64) + 0.5)
        if kind == "weight_norm":
            nn.utils.parametrizations.weight_norm(self.trunk.head)

    def weight(self) -> Tensor:
        w = self.trunk.head.weight
        if self.kind == "normalized":
            return F.normalize(w, dim=-1)
        if self.kind == "merged":
            return w + self.up @ self.down
        if self.kind == "rounded":
            return w + ((w / self.scale * 8).round() / 8 * self.scale - w).detach()
        return w

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        hidden = self.trunk.features(x)[:, :-1].flatten(0, 1)
        return F.cross_entropy(4 * F.normalize(hidden, dim=-1) @ self.weight().T, labels[:, 1:].flatten())


@pytest.mark.parametrize("kind", ["normalized", "merged", "rounded", "weight_norm"])
def test_heads_of_computed_weights_run_in_chunks(kind: str) -> None:
    model = Head(kind)
    found = compare(model, dict(model.named_parameters()), inputs(), chunked(7, 5, "eager"))
    found.check()
    (graph,) = found.graphs
    whole = [n.name for n in graph.graph.nodes if getattr(n.meta.get("val"), "shape", ()) == (2 * 22, 11)]
    assert found.loops >= 2 and not whole


def cosine(x: Tensor, w: Tensor) -> Tensor:
    return torch.matmul(x, F.normalize(w, dim=-1).transpose(0, 1))


def test_a_normalized_parameter_is_the_weight_and_its_axes_are_features() -> None:
    graph, axes, (region,) = regions_of(cosine, randn(2, 7, 4), nn.Parameter(randn(11, 4)))
    product = node(graph, aten.matmul.default)
    assert region.n == 7 and product in region.nodes
    assert Weights(graph).in_product(product) is product.args[1]
    assert Weights(graph).features(axes, [product]) == axes.of(product.args[1])


def test_what_a_module_does_not_hold_is_no_computed_weight() -> None:
    """Normalized keys are not: along them it is attention."""
    graph = normal_graph(lambda x, up, keys: cosine(F.linear(x, up), keys), randn(2, 7, 4), randn(4, 4), randn(11, 4))
    assert Weights(graph).in_product(node(graph, aten.matmul.default)) is None
    assert made_of_weights(graph) == set()


def test_a_product_of_two_computed_weights_has_none() -> None:
    """Positions that attend to positions: no work on tokens."""

    def fn(table: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        return torch.matmul(table * table + queries, (table * keys).transpose(0, 1))

    graph = normal_graph(fn, *(nn.Parameter(randn(7, 4)) for _ in range(3)))
    assert Weights(graph).in_product(node(graph, aten.matmul.default)) is None


def test_axes_of_the_tokens_are_no_features_of_computed_weights() -> None:
    """Scores of learned positions, added to what the tokens give: their rows are the tokens."""

    def fn(ids: Tensor, table: Tensor, positions: Tensor, turn: Tensor) -> Tensor:
        x = F.embedding(ids, table) + positions
        return x + torch.matmul(torch.matmul(x, F.linear(positions, turn).transpose(0, 1)).softmax(-1), x)

    ids = torch.randint(0, 5, (2, 7))
    graph = normal_graph(fn, ids, *(nn.Parameter(randn(*s)) for s in ((5, 4), (7, 4), (4, 4))))
    axes, product = Axes(graph), node(graph, aten.matmul.default)
    weights = Weights(graph)
    assert weights.in_product(product) is product.args[1]
    tokens = axes.of(graph.find_nodes(op="placeholder")[0])
    assert not tokens & weights.features(axes, [product])


def test_looked_up_rows_are_no_weight() -> None:
    def fn(x: Tensor, table: Tensor, at: Tensor) -> Tensor:
        return torch.matmul(x, F.embedding(at, table).transpose(0, 1))

    graph = normal_graph(fn, randn(2, 7, 4), nn.Parameter(randn(11, 4)), torch.arange(3))
    assert node(graph, aten.embedding.default) not in made_of_weights(graph)


def test_a_mask_of_floats_beside_parameters_is_no_weight() -> None:
    """It ties tokens together as attention does, so they are what is cut, and no features."""

    def fn(x: Tensor, mask: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return x + F.linear(torch.matmul(mask, F.linear(x, up)), down)

    weights = nn.Parameter(randn(6, 4)), nn.Parameter(randn(4, 6))
    graph, _, regions = regions_of(fn, randn(2, 7, 4).detach(), randn(2, 7, 7).detach(), *weights)
    assert Weights(graph).in_product(node(graph, aten.matmul.default)) is None
    assert [r.n for r in regions] == [7, 7]


def test_a_step_that_is_given_hidden_states_and_a_mask_is_cut_along_the_tokens() -> None:
    model, (x, labels) = Tiny(bias=False), inputs()
    mask = torch.rand(2, 23, 23, dtype=torch.float64).softmax(-1)

    def step(x: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.head(x + mask @ model.features(x)).flatten(0, 1), labels.flatten())

    found = compare(step, dict(model.named_parameters()), (x, mask, labels), chunked(7, 5, "eager"))
    found.check()
    assert {r.tokens for r in found.reports[0].regions if r.loop} == {"23"}


@pytest.mark.parametrize("trained", [False, True])
def test_a_matrix_that_is_given_beside_parameters_is_a_weight(trained: bool) -> None:
    """A teacher's head, an adapter."""
    given = randn(2, 4).detach().requires_grad_(trained)
    held = nn.Parameter(randn(4, 4))
    graph = normal_graph(lambda x, w, g: F.linear(F.linear(x, w), g), randn(2, 7, 4).detach(), held, given)
    product = node(graph, aten.linear.default, 1)
    assert Weights(graph).in_product(product) is product.args[1]


CONSTANTS: list[Callable[[Tensor], Tensor]] = [
    lambda w: w * torch.eye(4, dtype=w.dtype),
    lambda w: torch.tril(w) + torch.ones(4, 4, dtype=w.dtype),
]


@pytest.mark.parametrize("change", CONSTANTS)
def test_constants_may_enter_a_weight(change: Callable[[Tensor], Tensor]) -> None:
    graph = normal_graph(lambda x, w: torch.matmul(x, change(w)), randn(2, 7, 4), nn.Parameter(randn(4, 4)))
    product = node(graph, aten.matmul.default)
    assert Weights(graph).in_product(product) is product.args[1]


class Latents(nn.Module):
    """Queries that the model learns, the same for each text; projected, or as they are."""

    def __init__(self, projected: bool) -> None:
        super().__init__()
        self.projected = projected
        self.latents = nn.Parameter(randn(3, 8))
        self.q, self.k, self.up, self.down = (nn.Linear(8, 8, dtype=torch.float64) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        scores = (self.q(latents) if self.projected else latents) @ self.k(x).mT
        return self.down(F.gelu(self.up(scores.softmax(-1) @ x))).square().sum()


@pytest.mark.parametrize("projected", [True, False])
def test_a_weight_repeated_over_the_texts_does_not_make_them_features(projected: bool) -> None:
    model = Latents(projected)
    leaves = {n: p for n, p in model.named_parameters() if projected or not n.startswith("q.")}
    found = compare(model, leaves, (randn(5, 7, 8).detach(),), chunked(4, 4, "eager"))
    found.check()
    (graph,) = found.graphs
    assert not products_outside(graph)


def test_weights_that_tokens_choose_of_a_stack_are_weights() -> None:
    """Experts of each token: the axes of the stack are features, that of the tokens is none."""

    def experts(x: Tensor, stack: Tensor, chosen: Tensor) -> Tensor:
        return torch.bmm(x[:, None], stack[chosen].mT).squeeze(1)

    graph, axes, (region,) = regions_of(experts, randn(7, 4), randn(3, 6, 4), torch.tensor([2, 0, 1, 1, 2, 0, 0]))
    product, stack = node(graph, aten.bmm.default), graph.find_nodes(op="placeholder")[1]
    weight = Weights(graph).in_product(product)
    assert weight is not None and stack_of(weight) is stack
    assert Weights(graph).features(axes, [product]) == axes.of(stack)
    assert region.n == 7 and product in region.nodes


def test_rows_of_a_table_are_no_experts() -> None:
    """Relative positions: a table for pairs of tokens, not a stack of weights."""
    far = torch.arange(7)[:, None] - torch.arange(7) + 6
    graph = normal_graph(lambda x, table: torch.einsum("btd,tsd->bts", x, table[far]), randn(2, 7, 4), randn(13, 4))
    assert not [n for n in graph.nodes if stack_of(n) is not None]


class Picture(nn.Module):
    """One picture of rows and columns; attention whose scores know how far apart the rows and columns of a pair are."""

    apart: Tensor

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width).double(), nn.Linear(width, width).double()
        self.rows, self.columns = (nn.Parameter(randn(2 * side - 1, width)) for _ in range(2))
        self.register_buffer("apart", torch.arange(side)[:, None] - torch.arange(side) + side - 1)

    def forward(self, x: Tensor) -> Tensor:
        h, w, d = x.shape
        q, k, v = self.qkv(x).flatten(0, 1).chunk(3, -1)
        pairs = (q @ k.T).view(h, w, h, w)
        square = q.view(h, w, d)
        pairs = pairs + torch.einsum("hwc,hkc->hwk", square, self.rows[self.apart])[..., None]
        pairs = pairs + torch.einsum("hwc,wkc->hwk", square, self.columns[self.apart])[:, :, None]
        mixed = pairs.view(h * w, h * w).softmax(-1) @ v
        return x + F.gelu(self.out(mixed)).view(h, w, d)


def test_positions_that_are_looked_up_are_no_features() -> None:
    """Each row of a picture is multiplied by a matrix of its own: that does not make rows features."""
    model = nn.Sequential(Picture(6, 8), Picture(6, 8))
    found = compare(lambda x: model(x).square().sum(), dict(model.named_parameters()), (randn(6, 6, 8),), chunked(7, 5))
    found.check()
    assert found.loops >= 3
    assert not [product for graph in found.graphs for product in products_outside(graph)]


def test_a_matrix_merged_of_weights_is_not_left_outside() -> None:
    """Some adapters multiply the identity by their two factors, to know their product's norm (DoRA)."""
    model = Tiny()
    base, down, up = (nn.Parameter(randn(*s)) for s in ((8, 8), (2, 8), (8, 2)))

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        merged = F.linear(F.linear(torch.eye(8, dtype=x.dtype), down), up).T
        scale = 1 / (base + merged).norm(dim=1)
        hidden = model.features(x)
        hidden = scale * (F.linear(hidden, base) + F.linear(F.linear(hidden, down), up))
        return F.cross_entropy(model.head(hidden).flatten(0, 1), labels.flatten())

    leaves = dict(model.named_parameters()) | {"base": base, "down": down, "up": up}
    found = compare(loss, leaves, inputs(), chunked(7, 5, "eager"))
    found.check()
    assert found.loops >= 2
    assert not [r.reason for report in found.reports for r in report.refusals]
