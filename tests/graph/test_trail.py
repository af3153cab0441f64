"""The trail of one place goes where rules lead, and not through what has it twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from mstc.graph.axes import Axes
from mstc.graph.places import Place
from testkit.capture import node, normal_graph, randn

aten = torch.ops.aten


def trail(fn: Callable[..., Any], target: Any, dim: int, *inputs: Tensor) -> tuple[fx.Graph, Axes, int]:
    """A trail that starts at a dimension of the first call of an op."""
    graph = normal_graph(fn, *inputs)
    axes, start = Axes(graph), node(graph, target)
    return graph, axes, axes.follow(start, Place(dim, start.meta["val"].shape[dim]))


def pairs(x: Tensor) -> Tensor:
    return (x.unsqueeze(1) + x.unsqueeze(2)).sin().cos()


def test_it_leads_forward_and_backward() -> None:
    graph, axes, rows = trail(lambda x: x.exp().sin().transpose(1, 2).cos(), aten.sin.default, 1, randn(1, 6, 4))
    at = {n.name: axes.places(n, rows) for n in graph.nodes if n.op == "call_function"}
    assert at == {"exp": [Place(1, 6)], "sin": [Place(1, 6)], "transpose": [Place(2, 6)], "cos": [Place(2, 6)]}


def test_sides_that_are_one_axis_are_told_apart() -> None:
    graph, axes, rows = trail(pairs, aten.sin.default, 1, randn(1, 6, 4))
    cos = node(graph, aten.cos.default)
    sides = {axes.find(a) for a, p in axes._places[cos] if p.dim == 2}
    assert axes.places(cos, rows) == [Place(1, 6)] and rows not in sides


def test_what_has_it_twice_is_not_on_it() -> None:
    graph, axes, rows = trail(pairs, aten.sin.default, 1, randn(1, 6, 4))
    assert axes.places(node(graph, aten.add.Tensor), rows) == []


def test_all_results_of_an_op_have_it_or_none() -> None:
    def halves(x: Tensor) -> Tensor:
        a, b = x.split(2, -1)
        return a.sin() + b.transpose(1, 2).sin()

    graph, axes, rows = trail(halves, aten.sin.default, 1, randn(1, 6, 6, 4))
    split = node(graph, aten.split.Tensor)
    assert all(axes.places(n, rows) == [Place(1, 6)] for n in (split, *split.users))
    assert axes.places(node(graph, aten.transpose.int), rows) == []


def test_it_is_followed_once() -> None:
    graph, axes, rows = trail(pairs, aten.sin.default, 1, randn(1, 6, 4))
    start = node(graph, aten.sin.default)
    assert axes.follow(start, Place(1, 6)) == rows
    assert axes.places(start, rows) == [Place(1, 6)]
