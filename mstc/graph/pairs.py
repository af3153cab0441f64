"""How one op treats two places at once: the queries and the keys of scores."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
import torch.fx as fx

from mstc.graph.attention import is_attention
from mstc.graph.costs import is_heavy
from mstc.graph.places import DimFlow, Flow, Lost, Place, ViewFlow
from mstc.graph.rules import flow_of, rule_of
from mstc.graph.rules.call import Call, operands_of
from mstc.graph.rules.matmul import DISTANCES, contracted_with
from mstc.graph.rules.pointwise import pointwise
from mstc.graph.rules.reduce import REDUCE_RULES
from mstc.graph.sizes import quotient, same, shape_of

aten = torch.ops.aten

DROPOUT = (aten.dropout.default,)


_PRODUCTS = (aten.einsum.default, *DISTANCES)


def is_product(node: fx.Node) -> bool:
    """A matrix product of tokens, einsum and distances of all pairs of rows among them; a convolution has weights."""
    return node.target in _PRODUCTS or (is_heavy(node) and node.target is not aten.convolution.default)


def is_end(node: fx.Node) -> bool:
    """Whether a stretch may end in the node that loses the keys: a product with values, or a reduction."""
    return is_product(node) or is_attention(node) or node.target in REDUCE_RULES


def may_combine(node: fx.Node) -> bool:
    """Whether operands of an op of floats, element by element, have dimensions that others of them lack."""
    value = node.meta.get("val")
    if node.op != "call_function" or is_product(node) or not isinstance(value, torch.Tensor) or value.dim() < 2:
        return False
    operands = operands_of(node)
    if len(operands) < 2 or not value.is_floating_point() or rule_of(node.target) is not pointwise:
        return False
    return sum(len(shape_of(o.meta["val"])) > 0 and shape_of(o.meta["val"]) != shape_of(value) for o in operands) > 1


class _Item:
    """One of several results has every place where they have it."""

    repeats = False

    def carry(self, operand: int, place: Place) -> Place | Lost:
        return place

    def back(self, operand: int, place: Place) -> Place | None:
        return place


def flow_along(node: fx.Node) -> Flow | None:
    """As the rules say; one of several results, and a dropout that draws, go along: what they stand in is found."""
    if node.target is operator.getitem:
        return _Item() if isinstance(node.meta.get("val"), torch.Tensor) else None
    return pointwise(Call(node)) if node.target in DROPOUT else flow_of(node)


def inputs_of(node: fx.Node) -> list[fx.Node]:
    """Operands of an op; for one of several results, the node that has them."""
    return node.all_input_nodes if node.target is operator.getitem else operands_of(node)


def one_of(places: Iterable[Place | Lost]) -> Place | None:
    """The place that all of them are."""
    found = set(places)
    one = found.pop() if len(found) == 1 else None
    return one if isinstance(one, Place) else None


def parts_of(flow: Flow | None, place: Place, start: Place) -> list[Place]:
    """The parts that a view splits a place into, as parts of the place ``start`` that it came from."""
    found = []
    for d, n in enumerate(flow.after) if isinstance(flow, ViewFlow) else ():
        part = flow.back(0, Place(d, n))  # type: ignore[union-attr]
        if part is None or part.dim != place.dim or same(part.n, 1) or same(part.n, place.n):
            continue
        outer, inner = quotient(part.outer, place.outer), quotient(part.inner, place.inner)
        if outer is not None and inner is not None and same(outer * part.n * inner, place.n):
            found.append(Place(start.dim, part.n, start.outer * outer, start.inner * inner))
    return found


def _keeps(flow: Flow | None, i: int, dim: int) -> bool:
    """Whether an op mixes a dimension of an operand, but its result has it in the same place (softmax, cumsum, cat)."""
    if not isinstance(flow, DimFlow) or len(flow.shapes[i]) != len(flow.result) or same(flow.result[dim], 1):
        return False
    stay = all(target in (d, Lost.MIXED) for d, target in enumerate(flow.maps[i]))
    return stay and flow.maps[i][dim] is Lost.MIXED and not any(dim in targets for targets in flow.maps)


def kept(flow: Flow, i: int, keys: Place) -> Place | None:
    """Where mixed keys of operand ``i`` stand in the result."""
    if (keys.outer, keys.inner) != (1, 1) or not _keeps(flow, i, keys.dim):
        return None
    assert isinstance(flow, DimFlow)
    return Place(keys.dim, flow.result[keys.dim])


def kept_before(flow: Flow, i: int, keys: Place) -> Place | None:
    """Where keys that an op mixes stand in its operand ``i``."""
    if (keys.outer, keys.inner) != (1, 1) or not isinstance(flow, DimFlow) or len(flow.shapes[i]) <= keys.dim:
        return None
    n = flow.shapes[i][keys.dim]
    return Place(keys.dim, n) if _keeps(flow, i, keys.dim) and not same(n, 1) else None


def beside(node: fx.Node, operand: int, keys: Place) -> list[tuple[int, Place]]:
    """Where the keys of an operand stand in the other operands that a product sums along with it."""
    if not is_product(node):
        return []
    return [(i, Place(d, keys.n, keys.outer, keys.inner)) for i, d in contracted_with(Call(node), operand, keys.dim)]
