"""Matrix products: batch and row dimensions go along, contracted ones are mixed."""

from __future__ import annotations

import torch

from mstc.graph.convolution import is_pointwise_convolution
from mstc.graph.einsum import names_of
from mstc.graph.places import Flow, Lost
from mstc.graph.rules.call import Call, Map, Rule

aten = torch.ops.aten
MIXED = Lost.MIXED

DISTANCES = (aten._euclidean_dist.default, aten._cdist_forward.default)  # what torch.cdist becomes


def linear(call: Call) -> Flow | None:
    """y[..., n] = sum_k x[..., k] w[n, k] + b[n]"""
    rank = len(call.shape(0))
    if len(call.shape(1)) != 2:
        return None
    last = rank - 1
    maps: list[Map] = [(*range(last), MIXED), (last, MIXED)]
    if len(call.operands) == 3:
        maps.append((last,))
    return call.flow(*maps)


def addmm(call: Call) -> Flow | None:
    """y[m, n] = b[m, n] + sum_k x[m, k] w[k, n], the first operand broadcast"""
    bias = tuple(range(2 - len(call.shape(0)), 2))
    return call.flow(bias, (0, MIXED), (MIXED, 1))


def mm(call: Call) -> Flow | None:
    return call.flow((0, MIXED), (MIXED, 1))


def bmm(call: Call) -> Flow | None:
    return call.flow((0, 1, MIXED), (0, MIXED, 2))


def baddbmm(call: Call) -> Flow | None:
    bias = tuple(range(3 - len(call.shape(0)), 3))
    return call.flow(bias, (0, 1, MIXED), (0, MIXED, 2))


def matmul(call: Call) -> Flow | None:
    """Batched product with broadcast leading dimensions; vectors on either side."""
    left, right = len(call.shape(0)), len(call.shape(1))
    rank = len(call.result)
    if left == 0 or right == 0:
        return None
    rows = 1 if left > 1 else 0
    columns = 1 if right > 1 else 0
    batch = rank - rows - columns
    a = [batch - (left - 2) + d for d in range(left - 2)] if left > 1 else []
    b = [batch - (right - 2) + d for d in range(right - 2)] if right > 1 else []
    left_map: Map = (*a, batch, MIXED) if left > 1 else (MIXED,)
    right_map: Map = (*b, MIXED, batch + rows) if right > 1 else (MIXED,)
    return call.flow(left_map, right_map)


def distance(call: Call) -> Flow | None:
    """y[..., i, j] = |x[..., i, :] - z[..., j, :]|, with broadcast leading dimensions"""
    rank = len(call.result)
    ahead = [tuple(range(rank - len(s), rank - 2)) for s in call.shapes]
    return call.flow((*ahead[0], rank - 2, MIXED), (*ahead[1], rank - 1, MIXED))


def einsum(call: Call) -> Flow | None:
    """What stands in the result goes along, all else is contracted; no diagonals."""
    terms, result = names_of(call.node)
    if any(len(set(term)) != len(term) for term in terms):
        return None
    return call.flow(*(tuple(result.index(name) if name in result else MIXED for name in term) for term in terms))


def convolution(call: Call) -> Flow | None:
    """y[b, n, ...] = sum_k x[b, k, ...] w[n, k] + b[n], k in the group of n; any other convolution is no product."""
    if not is_pointwise_convolution(call.node):
        return None
    rank = len(call.shape(0))
    out = 1 if call.arg("groups") == 1 else MIXED  # groups of channels are counted from the first
    maps: list[Map] = [(0, MIXED, *range(2, rank)), (out, *[MIXED] * (rank - 1))]
    if len(call.operands) == 3:
        maps.append((out,))
    return call.flow(*maps)


def contracted_with(call: Call, operand: int, dim: int) -> list[tuple[int, int]]:
    """The operands and their dimensions that a product sums along with dimension ``dim`` of ``operand``."""
    if call.target is aten.einsum.default:
        terms, _ = names_of(call.node)
        name = terms[operand][dim]
        return [(i, term.index(name)) for i, term in enumerate(terms) if i != operand and name in term]
    left, right = (0, 1) if call.target is aten.linear.default else (len(call.operands) - 2, len(call.operands) - 1)
    ranks = [len(s) for s in call.shapes]
    by_rows = call.target in (aten.linear.default, *DISTANCES)
    summed = {left: ranks[left] - 1, right: ranks[right] - 1 if by_rows else max(ranks[right] - 2, 0)}
    if summed.get(operand) != dim:
        return []
    return [(i, d) for i, d in summed.items() if i != operand]


MATMUL_RULES: dict[object, Rule] = {
    **dict.fromkeys(DISTANCES, distance),
    aten.linear.default: linear,
    aten.addmm.default: addmm,
    aten.mm.default: mm,
    aten.bmm.default: bmm,
    aten.baddbmm.default: baddbmm,
    aten.matmul.default: matmul,
    aten.einsum.default: einsum,
    aten.convolution.default: convolution,
}
