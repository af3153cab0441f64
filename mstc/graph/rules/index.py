"""Reads at given positions: the index's dimensions go along, the dimension read from is mixed."""

from __future__ import annotations

import torch
import torch.fx as fx

from mstc.graph.places import Flow, Lost
from mstc.graph.rules.call import Call, Map, Rule, mixing
from mstc.graph.sizes import same

aten = torch.ops.aten
MIXED = Lost.MIXED


def embedding(call: Call) -> Flow | None:
    """y[..., d] = table[index[...], d]"""
    rank = len(call.result)
    return call.flow((MIXED, rank - 1), tuple(range(rank - 1)))


def gather(call: Call) -> Flow | None:
    """y[i, j] = x[i, index[i, j]] for dim = 1: other dimensions must have equal sizes."""
    read = _beside(call)
    # Along ``dim`` the index is free, but its result is not aligned with the source.
    return None if read is None else call.flow(read, tuple(range(len(read))))


def scatter(call: Call) -> Flow | None:
    """x with numbers written at index: tokenwise along the dimensions other than ``dim``."""
    each = _beside(call)
    return None if each is None else call.flow(*(each for _ in call.operands))


def _beside(call: Call) -> Map | None:
    """The identity but for ``dim``, where source and index have equal sizes in all other dimensions."""
    source, index = call.shape(0), call.shape(1)
    if len(source) != len(index) or not source:
        return None
    dim = call.dim()
    if any(d != dim and not same(source[d], index[d]) for d in range(len(source))):
        return None
    return mixing(len(source), dim)


def index_select(call: Call) -> Flow | None:
    return call.flow(mixing(len(call.shape(0)), call.dim()), (call.dim(),))


def index(call: Call) -> Flow | None:
    """x[i, j, :] with index tensors at adjacent dimensions, broadcast together, or x[:, mask]."""
    given = call.arg("indices")
    used = [i for i, g in enumerate(given) if g is not None]
    if not used or used != list(range(used[0], used[-1] + 1)):
        return None
    indices = [g for g in given if isinstance(g, fx.Node)]
    first, count = used[0], len(used)
    if any(g.meta["val"].dtype in (torch.bool, torch.uint8) for g in indices):
        masked = indices[0].meta["val"].dim()  # what a mask selects of its dimensions stands in one
        return call.flow(_indexed(call, first, masked, 1), (MIXED,) * masked) if count == 1 else None
    rank = max(g.meta["val"].dim() for g in indices)
    source = _indexed(call, first, count, rank)
    ranks = [g.meta["val"].dim() for g in indices]
    return call.flow(source, *(tuple(range(first + rank - r, first + rank)) for r in ranks))


def _indexed(call: Call, first: int, count: int, rank: int) -> Map:
    """Where x goes when ``count`` of its dimensions, from ``first`` on, become ``rank`` others."""
    return tuple(
        d if d < first else MIXED if d < first + count else d - count + rank for d in range(len(call.shape(0)))
    )


def one_hot(call: Call) -> Flow | None:
    """Needs the number of classes: by default it is read off all the values."""
    if call.arg("num_classes") < 0:
        return None
    return call.flow(tuple(range(len(call.shape()))))


INDEX_RULES: dict[object, Rule] = {
    aten.embedding.default: embedding,
    aten.gather.default: gather,
    aten.scatter.value: scatter,
    aten.scatter.src: scatter,
    aten.scatter_add.default: scatter,
    aten.index_select.default: index_select,
    aten.index.Tensor: index,
    aten.one_hot.default: one_hot,
}
