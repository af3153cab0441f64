"""Bodies: a region's graph for a chunk of a given length."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.places import Place
from mstc.graph.regions import Region
from mstc.graph.sizes import Size, evaluate, shape_of, size, symbols_of
from mstc.ops import keep as keep  # defines mstc::keep
from mstc.ops.pieces import Cut, dense_strides, order_of

aten = torch.ops.aten

_TAKES_SIZES = {
    aten.view.default: 1,
    aten.reshape.default: 1,
    aten._unsafe_view.default: 1,
    aten.expand.default: 1,
    aten.new_zeros.default: 1,
    aten.new_ones.default: 1,
    aten.new_full.default: 1,
    aten.new_empty.default: 1,
    aten.zeros.default: 0,
    aten.ones.default: 0,
    aten.full.default: 0,
    torch.ops.mstc.keep.default: 1,
}
# A squeeze would also drop an axis whose chunks have length 1.
_BECOMES_VIEW = (
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)


# The length of the chunk that a body runs on, among the lengths that its sizes are made of.
LENGTH = sympy.Symbol("chunk_length", integer=True, positive=True)

Lengths = Mapping[sympy.Symbol, Any]  # what a body is made for: ints, SymInts, or proxies of its own inputs


def cut_of(place: Place) -> Cut:
    """How to cut along the axis."""
    return Cut(place.dim, place.outer, place.inner)


@dataclass(frozen=True)
class Value:
    """Shape, layout, dtype and device of one whole tensor of a loop; ``cut`` is None where it is not cut.

    Sizes that are no numbers are expressions in the graph's dynamic lengths; `at` puts these in.
    """

    shape: tuple[Size, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    cut: Cut | None

    @staticmethod
    def of(node: fx.Node, place: Place | None) -> Value:
        x = node.meta["val"]
        return Value(shape_of(x), order_of(x), x.dtype, x.device, cut_of(place) if place else None)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor, where its sizes are numbers."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Every size in it that may depend on a dynamic length."""
        return (*self.shape, self.cut.outer, self.cut.inner) if self.cut else self.shape

    def at(self, lengths: Lengths) -> Value:
        """The same value at these lengths."""
        cut = self.cut
        if cut is not None:
            cut = Cut(cut.dim, evaluate(cut.outer, lengths), evaluate(cut.inner, lengths))
        return replace(self, shape=tuple(evaluate(s, lengths) for s in self.shape), cut=cut)

    def chunk(self, length: Size) -> tuple[Size, ...]:
        return self.cut.shape(self.shape, length) if self.cut else self.shape

    def fake(self, mode: compat.FakeTensorMode, lengths: Lengths) -> torch.Tensor:
        """A stand-in for a dense chunk (or for the whole where nothing is cut)."""
        shape = tuple(evaluate(s, lengths) for s in self.chunk(LENGTH))
        strides = dense_strides(shape, self.order)
        with mode:
            return torch.empty_strided(shape, strides, dtype=self.dtype, device=self.device)


def dynamic_lengths(region: Region) -> tuple[sympy.Symbol, ...]:
    """The dynamic lengths that the region's sizes are made of."""
    return symbols_of(_sizes(region))


def _sizes(region: Region) -> Iterator[Size]:
    yield region.n
    inside = (*region.nodes, *region.sums)
    places = [*(p for _, p in (*region.tokens, *region.outputs)), *(p.place for p in region.proofs.values())]
    yield from (s for place in places for s in (place.outer, place.inner))
    for node in dict.fromkeys((*inside, *(i for n in inside for i in n.all_input_nodes))):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            yield from shape_of(value)
        elif isinstance(value, torch.SymInt):
            yield size(value)


def forward_body(region: Region, lengths: Lengths | None) -> fx.GraphModule:
    """The region's own nodes on a chunk: (tokens..., shared..., lengths...) -> [outputs..., sums...].

    lengths: what the chunk's length `LENGTH` and the dynamic lengths are; where None, the body takes them as inputs,
    the chunk's own last.
    """
    graph = fx.Graph()
    env: dict[tuple[fx.Node, Place | None], fx.Node] = {}
    for i, (node, place) in enumerate(region.tokens):
        env[node, place] = graph.placeholder(f"t{i}")
    for i, node in enumerate(region.shared):
        env[node, None] = graph.placeholder(f"s{i}")
    if lengths is None:
        tracer = fx.proxy.GraphAppendingTracer(graph)
        names = (*dynamic_lengths(region), LENGTH)
        lengths = {s: fx.Proxy(graph.placeholder(f"n{i}"), tracer) for i, s in enumerate(names)}
    made: dict[fx.Node, fx.Node] = {}
    for node in (*region.nodes, *region.sums):
        made[node] = _copy(graph, region, node, lengths, env, made)
    values = [made[n] for n, _ in region.outputs] + [made[n] for n in region.sums]
    graph.output(values)
    return fx.GraphModule(torch.nn.Module(), graph)


def with_lengths(body: fx.GraphModule, values: Sequence[int]) -> fx.GraphModule:
    """A body for dynamic lengths (its last inputs) with numbers in their place."""
    inputs = body.graph.find_nodes(op="placeholder")
    numbers: dict[fx.Node, Any] = dict(zip(inputs[len(inputs) - len(values) :], values, strict=True))
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for node in body.graph.nodes:
        args = fx.node.map_arg(node.args, lambda n: numbers.get(n, n))
        if node.op == "call_function" and node.all_input_nodes and all(i in numbers for i in node.all_input_nodes):
            numbers[node] = node.target(*args)  # arithmetic of lengths
        elif node not in numbers:
            made[node] = graph.node_copy(node, lambda n: numbers[n] if n in numbers else made[n])
    return fx.GraphModule(torch.nn.Module(), graph)


def _copy(
    graph: fx.Graph,
    region: Region,
    node: fx.Node,
    lengths: Lengths,
    env: dict[tuple[fx.Node, Place | None], fx.Node],
    made: dict[fx.Node, fx.Node],
) -> fx.Node:
    """One node of the region in the body, its inputs mapped one by one as its proof says."""
    needs = iter(region.proofs[node].needs) if node in region.proofs else iter(())

    def number(value: Size) -> Any:
        found = evaluate(value, lengths)
        return found.node if isinstance(found, fx.Proxy) else found

    def lookup(source: fx.Node) -> Any:
        if isinstance(source.meta.get("val"), torch.SymInt):
            return number(size(source.meta["val"]))
        need = next(needs, None) if isinstance(source.meta.get("val"), torch.Tensor) else None
        return made[source] if source in made else env[source, need]

    args = fx.node.map_arg(node.args, lookup)
    kwargs = fx.node.map_arg(node.kwargs, lookup)
    target: Any = node.target
    if node in region.proofs and takes_shape(target):
        whole = shape_of(node.meta["val"])
        shape = [number(s) for s in cut_of(region.proofs[node].place).shape(whole, LENGTH)]
        target, args, kwargs = with_shape(target, args, kwargs, shape)
    return graph.call_function(target, args, kwargs)


def takes_shape(target: object) -> bool:
    """Whether a call of the op tells the shape of its result, or how dimensions of it are merged or dropped."""
    return target in _TAKES_SIZES or target in _BECOMES_VIEW


def with_shape(
    target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], shape: list[Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The same call for a result of another shape, for an op that `takes_shape`."""
    if target in _BECOMES_VIEW:
        return aten.reshape.default, (args[0], shape), {}
    at = _TAKES_SIZES[target]
    return target, (*args[:at], shape, *args[at + 1 :]), kwargs
