"""Regions: maximal convex stretches of nodes that are tokenwise along one axis.

Finding edits nothing. With T the set of tokenwise nodes of an axis, give every node a stage:

    stage(n) = max over operands p of  stage(p) + 1 if p in T and n not in T, else stage(p)

A path that leaves T and comes back raises the stage, so the nodes of T with equal stage form convex
stretches; their connected components are the regions. Sums over the axis of a region's values
belong to it: they end it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from mstc.graph.axes import Axes, Axis, NotTokenwise, Tokenwise
from mstc.graph.costs import is_heavy, matmul_flops
from mstc.graph.editor import has_order
from mstc.graph.places import Place
from mstc.graph.rules.call import operands_of
from mstc.graph.sizes import Size

aten = torch.ops.aten

# Tokenwise along batch or query axes, but never worth running piece by piece with recomputation:
# attention costs most to run again, and a table's gradient is a scatter into the whole table.
_LEFT_OUT = (aten.scaled_dot_product_attention.default, aten.embedding.default)


@dataclass(frozen=True)
class Region:
    """A stretch that may run on pieces of ``axis``.

    n: the axis's length; nodes: in order; sums: reductions over the axis that end it;
    tokens: inputs that are cut, with the place of the axis; shared: inputs used whole;
    outputs: values that others use, with the place; proofs: of every node.
    """

    axis: Axis
    n: Size
    nodes: tuple[fx.Node, ...]
    sums: tuple[fx.Node, ...]
    tokens: tuple[tuple[fx.Node, Place], ...]
    shared: tuple[fx.Node, ...]
    outputs: tuple[tuple[fx.Node, Place], ...]
    proofs: Mapping[fx.Node, Tokenwise]

    @property
    def heavy(self) -> tuple[fx.Node, ...]:
        return tuple(n for n in self.nodes if is_heavy(n))


def find_regions(graph: fx.Graph, axes: Axes) -> list[Region]:
    """All regions that hold a product with a weight, along the axes that `token_axes` chooses.

    A further axis counts only where the axes before it left a good part of those products.
    """
    claimed: set[fx.Node] = set()
    regions: list[Region] = []
    derived = position_only(graph, axes)
    total = sum(map(_weight_flops, graph.nodes))
    for axis in token_axes(graph, axes):
        proofs = _proofs(graph, axes, axis, claimed | derived)
        if sum(map(_weight_flops, proofs)) < 0.1 * total:
            continue
        for nodes in _components(graph, proofs):
            if any(_has_weight(n) for n in nodes):
                regions.append(make_region(axes, axis, nodes))
                claimed |= nodes
    order = {node: i for i, node in enumerate(graph.nodes)}
    return sorted(regions, key=lambda r: order[r.nodes[0]])


def _proofs(graph: fx.Graph, axes: Axes, axis: Axis, excluded: set[fx.Node]) -> dict[fx.Node, Tokenwise]:
    proofs: dict[fx.Node, Tokenwise] = {}
    for node in graph.nodes:
        if node in excluded or not _may_enter(node):
            continue
        if node.target is operator.getitem and node.args[0] not in proofs:
            continue  # one of several results of a node that stays outside
        proof = axes.tokenwise(node, axis)
        if isinstance(proof, Tokenwise):
            proofs[node] = proof
    return proofs


def token_axes(graph: fx.Graph, axes: Axes) -> list[Axis]:
    """Axes worth cutting, best first.

    Products with weights tell tokens from features: all of them are tokenwise along the tokens, few
    along one axis of features. Where attention, a scan or an unknown op mixes axes, those are the
    sequences, and a batch, which nothing mixes, is left alone. Axes with nearly the most of those
    FLOPs come first, the longest one before the others.
    """
    flops: dict[Axis, float] = {}
    sequences: set[Axis] = set()
    length: dict[Axis, float] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        work = _weight_flops(node)
        for axis in {a for operand in operands_of(node) for a in axes.of(operand)}:
            proof = axes.tokenwise(node, axis)
            if isinstance(proof, Tokenwise):
                flops[axis] = flops.get(axis, 0) + work
                length[axis] = float(_hint(proof.place.n))
            elif _mixes_like_a_sequence(node, axis, axes):
                sequences.add(axis)
    total = sum(map(_weight_flops, graph.nodes))
    found = [a for a, work in flops.items() if a in sequences and work >= 0.1 * total]
    most = max((flops[a] for a in found or flops), default=0.0)
    if not found:
        found = [a for a, work in flops.items() if work >= 0.9 * most]
    nearly = {a for a in found if flops[a] >= 0.9 * most > 0}
    found = [a for a in found if flops[a] > 0]
    return sorted(found, key=lambda a: (a in nearly, length[a] if a in nearly else flops[a]), reverse=True)


def position_only(graph: fx.Graph, axes: Axes) -> set[fx.Node]:
    """Values made of constants, integers and tables without tokens only: positions, rotary angles, masks.

    They are small and shared by all layers, so they stay outside regions and enter as inputs.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op in ("placeholder", "get_attr"):
            if isinstance(value, torch.Tensor) and (value.is_floating_point() and value.dim() > 1):
                continue
            if not node.meta.get("needs_grad"):
                found.add(node)
        elif (
            node.op == "call_function"
            and not node.meta.get("needs_grad")
            and node.target not in _LEFT_OUT
            and all(i in found for i in node.all_input_nodes)
        ):
            found.add(node)
    return found


def make_region(
    axes: Axes,
    axis: Axis,
    nodes: Iterable[fx.Node],
    sums: Iterable[fx.Node] | None = None,
    outputs: Iterable[fx.Node] | None = None,
) -> Region:
    """The record of a set of tokenwise nodes: its inputs, and its sums and outputs unless they are given."""
    members = set(nodes)
    ordered = tuple(n for n in next(iter(members)).graph.nodes if n in members)
    proofs: dict[fx.Node, Tokenwise] = {}
    for node in ordered:
        proof = axes.tokenwise(node, axis)
        assert isinstance(proof, Tokenwise)
        proofs[node] = proof
    ends = tuple(_sums_of(axes, axis, ordered) if sums is None else sums)
    tokens: dict[tuple[fx.Node, Place], None] = {}
    shared: dict[fx.Node, None] = {}
    for node in ordered:
        for operand, need in zip(operands_of(node), proofs[node].needs, strict=False):
            if operand in members:
                continue
            if need is None:
                shared[operand] = None
            else:
                tokens[operand, need] = None
    within = members | set(ends)
    if outputs is None:
        outputs = [n for n in ordered if any(u not in within for u in n.users) and _is_tensor(n)]
    placed = tuple((n, proofs[n].place) for n in outputs)
    return Region(axis, proofs[ordered[0]].place.n, ordered, ends, tuple(tokens), tuple(shared), placed, proofs)


def _sums_of(axes: Axes, axis: Axis, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for user in node.users:
            proof = axes.tokenwise(user, axis)
            if isinstance(proof, NotTokenwise) and proof.sums and len(operands_of(user)) == 1:
                found[user] = None
    return list(found)


def _components(graph: fx.Graph, proofs: Mapping[fx.Node, Tokenwise]) -> list[set[fx.Node]]:
    stage: dict[fx.Node, int] = {}
    parent: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in graph.nodes:
        inside = node in proofs
        stage[node] = max(
            (stage[p] + (1 if p in proofs and not inside else 0) for p in node.all_input_nodes), default=0
        )
        if inside:
            parent[node] = node
            for p in node.all_input_nodes:
                if p in proofs and stage[p] == stage[node]:
                    parent[find(node)] = find(p)
    groups: dict[fx.Node, set[fx.Node]] = {}
    for node in proofs:
        groups.setdefault(find(node), set()).add(node)
    return list(groups.values())


def _may_enter(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target not in _LEFT_OUT and not has_order(node)


def _mixes_like_a_sequence(node: fx.Node, axis: Axis, axes: Axes) -> bool:
    """Whether the node ties indices of the axis together as attention and scans do, not as norms and weights do."""
    if node.target is aten.scaled_dot_product_attention.default or axes.flow(node) is None:
        return True
    if len(axes.places(node, axis)) > 1:
        return True
    return is_heavy(node) and not _has_weight(node)


def _has_weight(node: fx.Node) -> bool:
    """Whether the node is a product with a parameter (or a buffer), perhaps cast or transposed."""
    return is_heavy(node) and any(_is_weight(o) for o in operands_of(node))


def _weight_flops(node: fx.Node) -> float:
    return matmul_flops(node) if _has_weight(node) else 0.0


def _is_weight(node: fx.Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    value = node.meta.get("val")
    return node.op in ("placeholder", "get_attr") and isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _hint(n: Size) -> float:
    return float(n) if isinstance(n, int) else 1e6
