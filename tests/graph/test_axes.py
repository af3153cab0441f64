"""Axes flow by what ops do, not by sizes or names; what is not proved is refused with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mstc.graph.axes import Axes, NotTokenwise, Tokenwise
from mstc.graph.places import Place
from testkit.capture import dynamic_graph, node, normal_graph, randn

aten = torch.ops.aten


def axis_of(axes: Axes, value: Any, dim: int) -> int:
    (found,) = {axes.find(a) for a, p in axes._places[value] if p.dim == dim}
    return found


def tokens_axis(fn: Callable[..., Any], *inputs: Any) -> tuple[Any, Axes, int]:
    """The graph, its axes, and the axis of dimension 1 of the first input."""
    graph = normal_graph(fn, *inputs)
    axes = Axes(graph)
    return graph, axes, axis_of(axes, next(iter(graph.nodes)), 1)


def test_equal_sizes_are_not_equal_axes() -> None:
    graph, axes, tokens = tokens_axis(lambda x, w: F.linear(x, w), randn(4, 4, 4), randn(4, 4))
    y = node(graph, aten.linear.default)
    assert axis_of(axes, y, 1) == tokens
    assert axis_of(axes, y, 2) != tokens and axis_of(axes, y, 0) != tokens


def test_an_op_that_aligns_two_axes_unites_them() -> None:
    graph, axes, tokens = tokens_axis(lambda x, y: x + y, randn(2, 5, 4), randn(5, 4))
    other = graph.find_nodes(op="placeholder")[1]
    assert axis_of(axes, other, 0) == tokens


def test_a_broadcast_dimension_does_not_unite() -> None:
    graph, axes, tokens = tokens_axis(lambda x, y: x + y, randn(2, 5, 4), randn(1, 4))
    assert tokens not in axes.of(graph.find_nodes(op="placeholder")[1])


def test_tokens_inside_rows() -> None:
    graph, axes, tokens = tokens_axis(lambda x: x.reshape(10, 4).sin(), randn(2, 5, 4))
    sin = node(graph, aten.sin.default)
    assert axes.places(sin, tokens) == [Place(0, 5, 2, 1)]
    assert axes.tokenwise(sin, tokens) == Tokenwise(Place(0, 5, 2, 1), (Place(0, 5, 2, 1),))


def test_rows_of_a_transposed_batch() -> None:
    graph, axes, tokens = tokens_axis(lambda x: x.transpose(0, 1).reshape(10, 4), randn(2, 5, 4))
    last = graph.output_node().args[0][0]
    assert axes.places(last, tokens) == [Place(0, 5, 1, 2)]


@pytest.mark.parametrize(
    ("fn", "reason", "sums"),
    [
        (lambda x: x.cumsum(1), "mixes", False),
        (lambda x: x.softmax(1), "mixes", False),
        (lambda x: x.mean(1), "mixes", False),
        (lambda x: x[:, 1:], "mixes", False),
        (lambda x: x.flip(1), "mixes", False),
        (lambda x: torch.cat([x, x], 1), "mixes", False),
        (lambda x: x.sum(1), "sums", True),
        (lambda x: x.sum(), "sums", True),
        (lambda x: x @ x.transpose(1, 2), "pairs|needs all|mixes", False),
        (lambda x: torch.roll(x, 1, 1), "mixes", False),
        (lambda x: torch.renorm(x, 2, 1, 1.0), "has no axis rule", False),
    ],
)
def test_what_ties_tokens_together_is_refused(fn: Callable[..., Any], reason: str, sums: bool) -> None:
    graph, axes, tokens = tokens_axis(fn, randn(2, 5, 4))
    last = graph.output_node().args[0][0]
    found = axes.tokenwise(last, tokens)
    assert isinstance(found, NotTokenwise) and found.sums == sums
    assert any(word in found.reason for word in reason.split("|"))


def test_every_piece_of_unequal_sizes_has_an_axis() -> None:
    graph = normal_graph(lambda x: x.split([2, 3], 1), randn(2, 5, 4))
    axes = Axes(graph)
    small, large = graph.output_node().args[0]
    (one,), (other,) = ([a for a in axes.of(n) if axes.places(n, a)[0].dim == 1] for n in (small, large))
    assert one != other and axes.places(large, other) == [Place(1, 3)]


@pytest.mark.parametrize(
    "fn", [lambda x: x.cumsum(1), lambda x: x[:, 1:], lambda x: x.flip(1), lambda x: x.softmax(1), lambda x: x[:, :2]]
)
def test_an_axis_that_an_op_makes_cannot_be_cut_there(fn: Callable[..., Any]) -> None:
    """Its results may run in pieces later on, but the op itself needs all of its operand for each piece."""
    graph, axes, _ = tokens_axis(fn, randn(2, 5, 4))
    last = graph.output_node().args[0][0]
    assert isinstance(axes.tokenwise(last, axis_of(axes, last, 1)), NotTokenwise)


def test_features_of_a_norm_cannot_be_cut() -> None:
    graph, axes, _ = tokens_axis(lambda x, w: F.layer_norm(x, (4,), w), randn(2, 5, 4), randn(4))
    norm = node(graph, aten.layer_norm.default)
    for place_axis in axes.of(norm):
        proof = axes.tokenwise(norm, place_axis)
        assert isinstance(proof, NotTokenwise) or proof.place.dim < 2


FREQUENCIES = 1 / (1 + torch.arange(4))


def grid(x: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = torch.meshgrid(torch.arange(x.shape[1]), torch.arange(x.shape[2]), indexing="ij")
    return rows.unsqueeze(-1), columns.unsqueeze(-1)


def angles(x: Tensor) -> tuple[Tensor, Tensor]:
    table = torch.arange(x.shape[1]).unsqueeze(-1) * FREQUENCIES
    return table.sin().unsqueeze(1), table.cos().unsqueeze(0)


@pytest.mark.parametrize("positions", [grid, angles])
def test_positions_of_a_square_picture_are_two_axes(positions: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """One count numbers rows and columns: graphs hold it, and what is made of it, once."""

    def with_positions(x: Tensor) -> Tensor:
        rows, columns = positions(x)
        return (x + rows * columns).flatten(1, 2).sin()

    graph = dynamic_graph(with_positions, randn(2, 6, 6, 4)).graph
    axes, sin = Axes(graph), graph.output_node().args[0][0]
    found = {axes.find(a) for a, p in axes._places[sin] if p.dim == 1}
    assert len(found) == 2
    assert all(isinstance(axes.tokenwise(sin, a), Tokenwise) for a in found)


def test_an_outer_sum_is_no_token_axis() -> None:
    """S x S of one vector: the axis stands twice."""
    graph, axes, tokens = tokens_axis(lambda x: x.unsqueeze(2) - x.unsqueeze(1), randn(2, 5))
    last = graph.output_node().args[0][0]
    found = axes.tokenwise(last, tokens)
    assert isinstance(found, NotTokenwise)
