"""Regions: maximal convex stretches of nodes that are tokenwise along one axis.

Finding edits nothing. Which nodes form a stretch is found by stages (`mstc.graph.convex`). Sums over the axis of a
region's values belong to it: they end it.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.fx as fx

from mstc.graph.attention import ATTENTION, is_attention
from mstc.graph.axes import Axes, Axis, NotTokenwise, Tokenwise
from mstc.graph.convex import stretches
from mstc.graph.costs import factors_of, is_heavy, matmul_flops, nbytes
from mstc.graph.draws import draws_mask
from mstc.graph.editor import has_order
from mstc.graph.places import Place
from mstc.graph.rules.call import operands_of
from mstc.graph.sizes import Size, same, shape_of
from mstc.graph.weights import Weights

aten = torch.ops.aten

# What runs over a sequence without being a mixer of its own name.
_SCANS = (aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default)

# What makes a sequence of one, or of several: a part of it, or one value per query.
_REMAKING = (
    aten.slice.Tensor,
    aten.cat.default,
    aten.pad.default,
    aten.constant_pad_nd.default,
    aten.index_select.default,
    *ATTENTION,
)

# Values made of labels belong to their loss where they are so many times larger.
WIDE_TARGETS = 8

# Attention over so few keys costs little to run again: of each token over what layers made of it, or over its fields.
FEW_KEYS = 16

# Tokenwise along batch or query axes, but not worth running piece by piece with recomputation:
# attention costs most to run again, and a table's gradient is a scatter into the whole table.
_LEFT_OUT = (*ATTENTION, aten.embedding.default)


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


def find_regions(graph: fx.Graph, axes: Axes, drawing: bool = False) -> list[Region]:
    """All regions that hold a product with a weight.

    One axis after another claims its nodes, until none is left that is tokenwise along any.
    drawing: let masks be drawn inside, as if they were drawn outside already.
    """
    regions: list[Region] = []
    order = {node: i for i, node in enumerate(graph.nodes)}
    outside = position_only(graph)
    taken = set(outside)
    weights = Weights(graph)
    for axis, proofs in _token_axes(graph, axes, weights, taken, drawing):
        for nodes in stretches(graph, proofs, partial(_is_sum, axes, axis)):
            if any(weights.in_product(n) for n in nodes):
                # A sum may be tokenwise along another axis: it belongs to the region that claims it first.
                sums = [s for s in _sums_of(axes, axis, sorted(nodes, key=order.__getitem__)) if s not in taken]
                if sums:
                    nodes |= wide_targets(outside, axes, axis, {*nodes, *sums})
                regions.append(make_region(axes, axis, nodes, sums))
                taken |= {*nodes, *sums}
    return sorted(regions, key=lambda r: order[r.nodes[0]])


def left_outside(graph: fx.Graph, axes: Axes, regions: Iterable[Region]) -> Iterator[tuple[fx.Node, str]]:
    """Products of rows with a weight that no region holds, each with the reason.

    A product of one vector has no rows, what is made of positions alone is made once for all layers, and what is made
    of weights alone (an adapter's merged matrix) is no work on tokens.
    """
    weights, inside = Weights(graph), {n for region in regions for n in region.nodes}
    products = {n: w for n in graph.nodes if (w := weights.in_product(n)) is not None and not weights.is_held(n)}
    left = [n for n, weight in products.items() if n not in inside and _has_rows(n, weight, axes)]
    if not left:
        return
    features, positions = weights.features(axes, list(products)), position_only(graph)
    for node in (n for n in left if n not in positions):
        proofs = [axes.tokenwise(node, axis) for axis in sorted(axes.of(node) - features)]
        reasons = [proof.reason for proof in proofs if isinstance(proof, NotTokenwise)]
        yield node, "; ".join(dict.fromkeys(reasons)) or "all its axes are features of some weight"


def _has_rows(product: fx.Node, weight: fx.Node, axes: Axes) -> bool:
    """Whether a product's result has a dimension of the other factor's."""
    flow = axes.flow(product)
    others = [i for i, o in enumerate(operands_of(product)) if o is not weight and o in factors_of(product)]
    return flow is None or any(
        not same(n, 1) and flow.back(i, Place(dim, n)) is not None
        for dim, n in enumerate(shape_of(product.meta["val"]))
        for i in others
    )


def _token_axes(
    graph: fx.Graph, axes: Axes, weights: Weights, taken: set[fx.Node], drawing: bool
) -> Iterator[tuple[Axis, dict[fx.Node, Tokenwise]]]:
    """Axes to cut, best first, with the nodes not ``taken`` that are tokenwise along each.

    Axes that stand in a weight are features. Where attention or a scan mixes an axis, it is a sequence, and
    goes before a batch, which nothing mixes. An unknown op (a loop that an earlier pass made, too) may mix any
    axis of what it reads: those stand between. Among equals the axis with the most FLOPs in products with weights
    comes first; where several have nearly the most, the longest.
    """
    products = [n for n in graph.nodes if weights.in_product(n)]
    features = weights.features(axes, products)
    sequences, perhaps, length = _sequences(graph, axes, weights, position_only(graph))
    sequences |= _sides_of_pairs(axes, products, features, sequences)
    sequences |= _remade(graph, axes, sequences)
    tried: set[Axis] = set()
    while True:
        flops: dict[Axis, float] = {}
        for node in products:
            for axis in axes.of(node) - features - tried if node not in taken else ():
                if isinstance(axes.tokenwise(node, axis), Tokenwise):
                    flops[axis] = flops.get(axis, 0.0) + matmul_flops(node)
        pool = [a for a in flops if a in sequences] or [a for a in flops if a in perhaps] or list(flops)
        if not pool:
            return
        most = max(flops[a] for a in pool)
        best = max((a for a in pool if flops[a] >= 0.9 * most), key=lambda a: (length.get(a, 0.0), -a))
        tried.add(best)
        yield best, _proofs(graph, axes, best, taken, drawing)


def _sides_of_pairs(axes: Axes, products: Sequence[fx.Node], features: set[Axis], sequences: set[Axis]) -> set[Axis]:
    """Axes that follow one side of a grid of pairs, whose sides are one axis, so that its rows can be cut.

    Where the sides are a sequence, so is what follows one of them.
    """
    rows = dict[Axis, Axis]()  # what is followed, and the axis of whose places
    for node in products:
        for axis in axes.of(node) - features - rows.keys():
            sides = axes.places(node, axis)
            if len(sides) > 1 and not any(isinstance(axes.tokenwise(node, row), Tokenwise) for row in rows):
                rows[axes.follow(node, sides[0])] = axis
    return {row for row, axis in rows.items() if axis in sequences}


def _remade(graph: fx.Graph, axes: Axes, sequences: set[Axis]) -> set[Axis]:
    """Axes of what is cut from sequences, put together with one, or attended: each text from some token on, say."""
    found = set[Axis]()
    for node in graph.nodes:
        if node.target in _REMAKING:
            rank = node.meta["val"].dim()
            for source in (o for o in operands_of(node) if o.meta["val"].dim() == rank):  # positions tell nothing
                dims = {p.dim for a in axes.of(source) & (sequences | found) for p in axes.places(source, a)}
                found |= {a for a in axes.of(node) - axes.of(source) if axes.places(node, a)[0].dim in dims}
    return found


def _sequences(
    graph: fx.Graph, axes: Axes, weights: Weights, outside: Collection[fx.Node]
) -> tuple[set[Axis], set[Axis], dict[Axis, float]]:
    """Axes whose indices something ties together as attention and scans do; those that an unknown op reads; the
    length of every axis.

    outside: what is made of labels and positions alone; an unknown op there (``labels[~mask] = 0``) tells nothing.
    """
    sequences, perhaps = set[Axis](), set[Axis]()
    length: dict[Axis, float] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        for axis in {a for operand in operands_of(node) for a in axes.of(operand)}:
            proof = axes.tokenwise(node, axis)
            if isinstance(proof, Tokenwise):
                length[axis] = _hint(proof.place.n)
            elif node in outside and axes.flow(node) is None:
                continue
            elif _mixes_like_a_sequence(node, axis, axes, weights):
                sequences.add(axis)
            elif axes.flow(node) is None:
                perhaps.add(axis)
    return sequences, perhaps, length


def _proofs(graph: fx.Graph, axes: Axes, axis: Axis, excluded: set[fx.Node], drawing: bool) -> dict[fx.Node, Tokenwise]:
    proofs: dict[fx.Node, Tokenwise] = {}
    for node in graph.nodes:
        if node in excluded or not (_may_enter(node) or (drawing and draws_mask(node))):
            continue
        if node.target is operator.getitem and node.args[0] not in proofs:
            continue  # one of several results of a node that stays outside
        proof = axes.tokenwise(node, axis)
        if isinstance(proof, Tokenwise):
            proofs[node] = proof
    return proofs


def position_only(graph: fx.Graph) -> dict[fx.Node, None]:
    """Values made of constants, integers and tables without tokens only: positions, rotary angles, masks.

    They are small and shared by all layers, so they stay outside regions and enter as inputs. What is made of
    random draws is neither.
    """
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op in ("placeholder", "get_attr"):
            if isinstance(value, torch.Tensor) and (value.is_floating_point() and value.dim() > 1):
                continue
            if not node.meta.get("needs_grad"):
                found[node] = None
        elif (
            node.op == "call_function"
            and not node.meta.get("needs_grad")
            and node.target not in _LEFT_OUT
            and not has_order(node)
            and all(i in found for i in node.all_input_nodes)
        ):
            found[node] = None
    return found


def wide_targets(outside: Collection[fx.Node], axes: Axes, axis: Axis, members: set[fx.Node]) -> set[fx.Node]:
    """What only these members read and is much larger than the labels it is made of: one-hot targets, smoothed ones.

    outside: what `position_only` found, in the order of the graph.
    """
    cone: set[fx.Node] = set()
    for node in reversed([n for n in outside if n.op == "call_function"]):
        readers = set(node.users)
        if not readers or not readers <= members | cone:
            continue
        if isinstance(axes.tokenwise(node, axis), Tokenwise):
            cone.add(node)
    made = sum(nbytes(n) for n in cone if members.intersection(n.users))
    labels = {i for n in cone for i in n.all_input_nodes} - cone
    return cone if made > WIDE_TARGETS * sum(map(nbytes, labels)) else set()


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
    within = members | set(ends)
    if outputs is None:
        outputs = [n for n in ordered if any(u not in within for u in n.users) and _is_tensor(n)]
    return region_of(axis, proofs, ends, outputs)


def region_of(
    axis: Axis, proofs: Mapping[fx.Node, Tokenwise], sums: Iterable[fx.Node], outputs: Iterable[fx.Node]
) -> Region:
    """The record of proven nodes, given in the graph's order: what they read from outside is cut or shared."""
    tokens: dict[tuple[fx.Node, Place], None] = {}
    shared: dict[fx.Node, None] = {}
    for node, proof in proofs.items():
        for operand, need in zip(operands_of(node), proof.needs, strict=False):
            if operand in proofs:
                continue
            if need is None:
                shared[operand] = None
            else:
                tokens[operand, need] = None
    nodes = tuple(proofs)
    placed = tuple((n, proofs[n].place) for n in outputs)
    return Region(axis, proofs[nodes[0]].place.n, nodes, tuple(sums), tuple(tokens), tuple(shared), placed, proofs)


def _sums_of(axes: Axes, axis: Axis, nodes: Iterable[fx.Node]) -> list[fx.Node]:
    found: dict[fx.Node, None] = {}
    for node in nodes:
        for user in node.users:
            if _is_sum(axes, axis, user):
                found[user] = None
    return list(found)


def _is_sum(axes: Axes, axis: Axis, node: fx.Node) -> bool:
    proof = axes.tokenwise(node, axis)
    return isinstance(proof, NotTokenwise) and proof.sums and len(operands_of(node)) == 1


def _may_enter(node: fx.Node) -> bool:
    left_out = node.target in _LEFT_OUT and not _attends_to_few(node)
    return node.op == "call_function" and not left_out and not has_order(node)


def _attends_to_few(node: fx.Node) -> bool:
    """Whether this is attention with few keys, whatever the call."""
    if not is_attention(node):
        return False
    keys = shape_of(operands_of(node)[1].meta["val"])[-2]
    return isinstance(keys, int) and keys <= FEW_KEYS


def _mixes_like_a_sequence(node: fx.Node, axis: Axis, axes: Axes, weights: Weights) -> bool:
    """Whether the node ties indices of the axis together as attention and scans do, not as norms and weights do."""
    if is_attention(node) or node.target in _SCANS:
        return True
    if "mixes_at" in node.meta:  # a loop that stands for attention: where its first operand is cut
        return node.meta["mixes_at"] in axes.places(node.args[0][0], axis)  # type: ignore[index, arg-type]
    if len(axes.places(node, axis)) > 1:
        return True
    return is_heavy(node) and weights.in_product(node) is None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _hint(n: Size) -> float:
    """A length to compare by: a dynamic one counts as longer than any number that is likely."""
    return float(n) if isinstance(n, int) else 1e6
