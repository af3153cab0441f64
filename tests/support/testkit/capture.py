"""Normal forms of small functions, without Dynamo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor, nn

from mstc import compat
from mstc.graph.axes import Axes
from mstc.graph.live import peak_bytes
from mstc.graph.normal_form import normalize
from mstc.graph.regions import Region, find_regions


class _Function(nn.Module):
    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, *args: Any) -> Any:
        return self.fn(*args)


def normal_graph(fn: Callable[..., Any], *inputs: Tensor) -> fx.Graph:
    """The graph of ``fn`` in normal form; ``fn`` returns a tensor or a tuple of tensors."""
    return normal_module(fn, *inputs).graph


def normal_module(fn: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The same as a module."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    proxies = [fx.Proxy(graph.placeholder(f"x{i}"), tracer) for i in range(len(inputs))]
    out = fn(*proxies)
    values = out if isinstance(out, tuple) else (out,)
    graph.output(tuple(v.node for v in values))
    return normalize(fx.GraphModule(nn.Module(), graph), list(inputs)).gm


def dynamic_graph(fn: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    """The same, captured by Dynamo with lengths that are symbols."""
    seen: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, args: list[Any]) -> Callable[..., Any]:
        seen.append(normalize(gm, args).gm)
        return gm.forward  # type: ignore[no-any-return]

    torch._dynamo.reset()
    torch.compile(fn, backend=keep, dynamic=True, fullgraph=True)(*inputs)
    return seen[0]


def regions_of(fn: Callable[..., Any], *inputs: Tensor) -> tuple[fx.Graph, Axes, list[Region]]:
    graph = normal_graph(fn, *inputs)
    axes = Axes(graph)
    return graph, axes, find_regions(graph, axes)


def node(graph: fx.Graph, target: Any, number: int = 0) -> fx.Node:
    """The call of an op, counted from the first."""
    return graph.find_nodes(op="call_function", target=target)[number]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def meta(*shape: int) -> Tensor:
    """A tensor of any size that holds nothing."""
    return torch.empty(shape, device="meta").requires_grad_()


def labels_of(nodes: Sequence[fx.Node]) -> list[str]:
    return [n.name for n in nodes]


def traced_peak(
    function: Callable[..., Any], *shapes: tuple[int, int], fused: bool = False, pooled: bool = False
) -> int:
    """The peak in bytes that is told of a function over float32 values of these shapes."""
    mode = compat.FakeTensorMode()
    with mode:
        fakes = [torch.empty(s) for s in shapes]
    return peak_bytes(compat.trace_flat(function, fakes), fused, pooled)
