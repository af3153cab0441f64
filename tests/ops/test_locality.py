"""Where the nodes of a body stand."""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import Tensor

from mstc import compat
from mstc.ops.locality import near_readers

aten = torch.ops.aten


def body() -> fx.GraphModule:
    """An activation that is a result and read late, a sum of a gradient that is a result, and products."""
    graph = fx.Graph()
    x, w, g = map(graph.placeholder, "xwg")
    act = graph.call_function(aten.silu.default, (x,))
    grad = graph.call_function(aten.mm.default, (g, w))
    scaled = graph.call_function(aten.mul.Tensor, (grad, x))
    total = graph.call_function(aten.sum.dim_IntList, (scaled, [0], True))
    flat = graph.call_function(aten.view.default, (total, [4]))
    twice = graph.call_function(aten.mul.Tensor, (grad, 2.0))
    out = graph.call_function(aten.mm.default, (twice, w))
    graph.output((out, flat, act))
    return fx.GraphModule({}, graph)


def test_results_come_last_but_sums_do_not_wait() -> None:
    given = body()
    moved = near_readers(given)
    targets = [n.target for n in moved.graph.nodes if n.op == "call_function"]
    product, times, last = aten.mm.default, aten.mul.Tensor, aten.silu.default
    assert targets == [product, times, aten.sum.dim_IntList, aten.view.default, times, product, last]
    inputs = [torch.randn(4, 4, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for a, b in zip(moved(*inputs), given(*inputs), strict=True):
        assert torch.equal(a, b)


def test_sums_of_few_terms_do_not_wait_either() -> None:
    """Two texts' gradients of what both share, which Inductor adds up without a loop."""
    with compat.FakeTensorMode():
        fakes = [torch.empty(2, 4), torch.empty(4, 4)]

    def shared(x: Tensor, w: Tensor) -> list[Tensor]:
        y = x.sin()
        total = y.sum(0)
        return [y @ w, total]

    given = compat.trace_flat(shared, fakes)
    order = [n.target for n in near_readers(given).graph.nodes if n.op == "call_function"]
    assert order == [aten.sin.default, aten.sum.dim_IntList, aten.mm.default]


def test_the_graph_itself_stays() -> None:
    given = body()
    before = str(given.graph)
    near_readers(given)
    assert str(given.graph) == before
