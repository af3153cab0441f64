"""Attention that is written out: softmax over scores, then a product with the values.

    o[i] = sum_j softmax_j(s[i, :])[j] v[j],    s[i, j] = f(q[i] . k[j], i, j)

Queries and keys come from the same tokens, so along the tokens this is a mixer. But a row of scores belongs to one
query alone: along the queries everything from the scores to o is tokenwise, with keys and values shared.
Nothing here looks at names or lengths. From the softmax the search goes forward to the products that contract its
dimension, chooses the query's dimension among the others, and walks back from the product. Two places are followed
through the axis rules: where the queries stand and where the keys stand. A value in which both stand has S x S
elements. Those are taken into the stretch, down to where only one of the two is left: queries, keys, positions,
per-head slopes, tables of relative positions. So masks and biases are made chunk by chunk as well, never whole.

Nodes of such a stretch may have other readers (a bias that all layers share): those keep them, the stretch has its
own copy. Finding edits nothing.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from mstc.graph.axes import Tokenwise
from mstc.graph.costs import hint, is_heavy
from mstc.graph.editor import has_order
from mstc.graph.places import Flow, Lost, Place
from mstc.graph.reach import ancestors, descendants
from mstc.graph.regions import Region, region_of
from mstc.graph.rules import flow_of
from mstc.graph.rules.call import Call, operands_of
from mstc.graph.rules.pointwise import pointwise
from mstc.graph.sizes import same, shape_of
from mstc.graph.weights import Weights

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
# They mix the keys, but their result has keys in the same dimension.
_ALONG_KEYS = (*_SOFTMAX, aten.cat.default, aten.slice.Tensor, aten.pad.default, aten.constant_pad_nd.default)
_DROPOUT = (aten.dropout.default,)
_ANY_AXIS = -1  # a stretch along queries lies on no axis of `mstc.graph.axes`: keys stand on the same one


@dataclass(frozen=True)
class Written:
    """One attention that is written out.

    softmax; product: of weights and values; scores: the products of queries and keys; region: from the
    scores to the product, along the queries; keys: where keys stand in values of the region; readers: what
    else reads its scores or weights; draws: random ops in it.
    """

    softmax: fx.Node
    product: fx.Node
    scores: tuple[fx.Node, ...]
    region: Region
    keys: Mapping[fx.Node, Place]
    readers: tuple[fx.Node, ...]
    draws: tuple[fx.Node, ...]


def find_written(graph: fx.Graph) -> Iterator[Written]:
    """All written-out attention, one record for each product with values."""
    softmaxes = [n for target in _SOFTMAX for n in graph.find_nodes(op="call_function", target=target)]
    if not softmaxes:
        return
    rank = {node: i for i, node in enumerate(graph.nodes)}
    weights = Weights(graph)
    seen: set[fx.Node] = set()
    for softmax in softmaxes:
        for found in _from_softmax(softmax, rank, weights):
            if found.product not in seen:
                seen.add(found.product)
                yield found


def is_product(node: fx.Node) -> bool:
    """A matrix product, einsum among them."""
    return is_heavy(node) or node.target is aten.einsum.default


# ------------------------------------------------------------------ forward: from the softmax to the values


@dataclass(frozen=True)
class _End:
    """A product that contracts the keys: where queries stand in its result, and its operand with the weights."""

    product: fx.Node
    queries: Place
    weights: int
    keys: Place


def _from_softmax(softmax: fx.Node, rank: Mapping[fx.Node, int], weights: Weights) -> Iterator[Written]:
    shape = shape_of(softmax.meta["val"])
    if len(shape) < 2:
        return
    over = Call(softmax).dim()
    keys = Place(over, shape[over])
    others = [d for d in range(len(shape)) if d != over and not same(shape[d], 1)]
    for dim in sorted(others, key=lambda d: (-_hint(softmax, d), -d)):
        ends, readers = _ends(softmax, Place(dim, shape[dim]), keys)
        found = [w for end in ends if (w := _written(softmax, end, readers, rank, weights)) is not None]
        if found:
            yield from found
            return


def _hint(node: fx.Node, dim: int) -> int:
    return hint(node.meta["val"].shape[dim])


def _ends(softmax: fx.Node, queries: Place, keys: Place) -> tuple[list[_End], list[fx.Node]]:
    """The products with values that the weights reach, and other nodes that read them."""
    ends: list[_End] = []
    readers: dict[fx.Node, None] = {}
    stack, seen = [(softmax, queries, keys)], {softmax}
    while stack:
        node, q, k = stack.pop()
        for user in node.users:
            if user in seen:
                continue
            flow = _flow(user)
            at = [i for i, operand in enumerate(operands_of(user)) if operand is node]
            carried = flow.carry(at[0], q) if flow is not None and len(at) == 1 else Lost.MIXED
            if flow is None or isinstance(carried, Lost):
                readers[user] = None
                continue
            if is_product(user) and isinstance(flow.carry(at[0], k), Lost):
                shared = all(flow.back(i, carried) is None for i in range(len(operands_of(user))) if i != at[0])
                if shared:
                    ends.append(_End(user, carried, at[0], k))
                else:
                    readers[user] = None
                continue
            onward = _keys_after(user, flow, at[0], k)
            if onward is None:
                readers[user] = None
                continue
            seen.add(user)
            stack.append((user, carried, onward))
    return ends, list(readers)


# ------------------------------------------------------------------ backward: from the product to the sources


def _written(
    softmax: fx.Node, end: _End, readers: list[fx.Node], rank: Mapping[fx.Node, int], weights: Weights
) -> Written | None:
    members, keys = _pull(end, set(), rank)
    scores = [n for n in members if n is not end.product and _pairs(n, members[n], keys, weights)]
    if softmax not in members or not scores:
        return None
    inner = _between(scores, end.product, rank)
    members, keys = _pull(end, inner, rank)
    if any(n.target is operator.getitem and n.args[0] not in members for n in members):
        return None
    proofs = {n: members[n] for n in sorted(members, key=rank.__getitem__)}
    within = [n for n in proofs if n in inner and n is not end.product]
    also = {u for n in within for u in n.users if u not in proofs}
    others = tuple(sorted({*readers, *also} - set(proofs), key=rank.__getitem__))
    draws = tuple(n for n in proofs if has_order(n))
    region = region_of(_ANY_AXIS, proofs, (), [end.product])
    return Written(softmax, end.product, tuple(scores), region, keys, others, draws)


def _pull(
    end: _End, inner: set[fx.Node], rank: Mapping[fx.Node, int]
) -> tuple[dict[fx.Node, Tokenwise], dict[fx.Node, Place]]:
    """Walk back from the product, latest node first, so that all readers of a node come before it.

    Taken are nodes in which queries and keys stand, and those in ``inner``, wherever a single place of the queries is
    asked of them. Also returned: where the keys stand.
    """
    wanted: dict[fx.Node, set[Place | None]] = {end.product: {end.queries}}
    keys: dict[fx.Node, Place] = {}
    members: dict[fx.Node, Tokenwise] = {}
    waiting = [(-rank[end.product], end.product)]
    while waiting:
        _, node = heapq.heappop(waiting)
        proof = _proof(node, wanted[node]) if node is end.product or node in keys or node in inner else None
        if proof is None:
            continue
        members[node] = proof
        for i, (operand, need) in enumerate(zip(_inputs(node), proof.needs, strict=True)):
            if operand not in wanted:
                wanted[operand] = set()
                heapq.heappush(waiting, (-rank[operand], operand))
            wanted[operand].add(need)
            place = _keys_of_operand(node, i, keys.get(node), end)
            if place is not None and need is not None:
                keys[operand] = place
    return members, keys


def _proof(node: fx.Node, wanted: set[Place | None]) -> Tokenwise | None:
    """That the node may run on pieces of the one place that is wanted of it.

    What draws stays outside, where its numbers are drawn whole; but a dropout, which weights go through, is a member.
    """
    place = next(iter(wanted))
    if has_order(node) and node.target not in _DROPOUT:
        return None
    if node.op != "call_function" or len(wanted) != 1 or place is None:
        return None
    if node.target is operator.getitem:
        return Tokenwise(place, (place,))
    flow = _flow(node)
    if flow is None:
        return None
    needs = tuple(flow.back(i, place) for i in range(len(operands_of(node))))
    return Tokenwise(place, needs) if any(needs) or flow.repeats else None


def _inputs(node: fx.Node) -> list[fx.Node]:
    """Operands of an op; for one of several results, the node that has them."""
    return node.all_input_nodes if node.target is operator.getitem else operands_of(node)


def _flow(node: fx.Node) -> Flow | None:
    """As the rules say; a dropout that draws goes along here, so that what it stands in is found."""
    return pointwise(Call(node)) if node.target in _DROPOUT else flow_of(node)


def _keys_of_operand(node: fx.Node, i: int, keys: Place | None, end: _End) -> Place | None:
    """Where the keys stand in operand ``i``, as far as they stand in the node."""
    if node is end.product:
        return end.keys if i == end.weights else None
    if node.target is operator.getitem:
        return keys
    flow = _flow(node)
    if keys is None or flow is None:
        return None
    back = flow.back(i, keys)
    if back is not None or node.target not in _ALONG_KEYS or (keys.outer, keys.inner) != (1, 1):
        return back
    shape = shape_of(operands_of(node)[i].meta["val"])
    whole = len(shape) == len(shape_of(node.meta["val"])) and not same(shape[keys.dim], 1)
    return Place(keys.dim, shape[keys.dim]) if whole else None


def _keys_after(node: fx.Node, flow: Flow, i: int, keys: Place) -> Place | None:
    """Where the keys of operand ``i`` stand in the result."""
    carried = flow.carry(i, keys)
    if isinstance(carried, Place):
        return carried
    if node.target not in _ALONG_KEYS or (keys.outer, keys.inner) != (1, 1):
        return None
    return Place(keys.dim, shape_of(node.meta["val"])[keys.dim])


def _pairs(node: fx.Node, proof: Tokenwise, keys: Mapping[fx.Node, Place], weights: Weights) -> bool:
    """Whether the node is a product of queries and keys: each from an operand of its own, the keys no weight."""
    flow = _flow(node)
    if not is_product(node) or node not in keys or flow is None:
        return False
    backs = [flow.back(i, keys[node]) for i in range(len(proof.needs))]
    pairs = list(zip(operands_of(node), proof.needs, backs, strict=True))
    with_queries = [o for o, q, _ in pairs if q is not None]
    with_keys = [o for o, q, k in pairs if k is not None and q is None]
    return bool(with_queries) and bool(with_keys) and not any(_is_matrix(o, weights) for o in with_keys)


def _is_matrix(node: fx.Node, weights: Weights) -> bool:
    """A weight, not keys: a router's softmax over logits is no attention."""
    return len(shape_of(node.meta["val"])) <= 2 and weights.is_weight(node)


def _between(scores: list[fx.Node], product: fx.Node, rank: Mapping[fx.Node, int]) -> set[fx.Node]:
    """The nodes on the ways from the scores to the product."""
    until = {n for n, at in rank.items() if at <= rank[product]}
    return ancestors([product], descendants(scores, until))
