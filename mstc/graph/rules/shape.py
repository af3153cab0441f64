"""Ops that only move elements: views, permutations, slices, joins, and tensors made from nothing."""

from __future__ import annotations

from typing import Any

import torch

from mstc.graph.places import Flow, Lost, ViewFlow
from mstc.graph.rules.call import Call, Map, Rule, broadcast_map, mixing, without
from mstc.graph.sizes import same

aten = torch.ops.aten
MIXED = Lost.MIXED


def view(call: Call) -> Flow | None:
    return ViewFlow(call.shape(), call.result)


def transpose(call: Call) -> Flow | None:
    rank = len(call.shape())
    if rank == 0:
        return call.flow(())
    a, b = call.dim("dim0"), call.dim("dim1")
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return call.flow(tuple(order))


def t(call: Call) -> Flow | None:
    return call.flow((1, 0) if len(call.shape()) == 2 else tuple(range(len(call.shape()))))


def permute(call: Call) -> Flow | None:
    rank = len(call.shape())
    order = [int(d) % rank for d in call.arg("dims")]
    return call.flow(tuple(order.index(d) for d in range(rank)))


def unsqueeze(call: Call) -> Flow | None:
    rank = len(call.shape())
    new = int(call.arg("dim")) % (rank + 1)
    return call.flow(tuple(d if d < new else d + 1 for d in range(rank)))


def expand(call: Call) -> Flow | None:
    return call.flow(broadcast_map(len(call.shape()), len(call.result)), repeats=True)


def one_dim_mixed(call: Call) -> Flow | None:
    """The dimension ``dim`` changes, the others stay: slice, cumsum, softmax, sort, split, ..."""
    rank = len(call.shape())
    if rank == 0:
        return call.flow(())
    return call.flow(mixing(rank, call.dim()))


def slice_(call: Call) -> Flow | None:
    """A slice that takes everything keeps the axis; any other makes a new one."""
    dim = call.dim()
    if same(call.shape()[dim], call.result[dim]) and call.arg("step", 1) == 1:
        return call.flow(tuple(range(len(call.shape()))))
    return one_dim_mixed(call)


def select(call: Call) -> Flow | None:
    """The dimension ``dim`` goes: select, unbind."""
    return call.flow(without(len(call.shape()), {call.dim(): MIXED}, removed=True))


def slice_scatter(call: Call) -> Flow | None:
    """x with a stretch of ``dim`` written: the other dimensions go along in both."""
    each = mixing(len(call.shape()), call.dim())
    return call.flow(each, each)


def select_scatter(call: Call) -> Flow | None:
    """x with one index of ``dim`` written."""
    rank, dim = len(call.shape()), call.dim()
    return call.flow(mixing(rank, dim), tuple(d for d in range(rank) if d != dim))


def cat(call: Call) -> Flow | None:
    rank = len(call.result)
    if any(len(s) != rank for s in call.shapes):
        return None  # the legacy empty tensor
    each = mixing(rank, call.dim())
    return call.flow(*(each for _ in call.operands))


def stack(call: Call) -> Flow | None:
    rank = len(call.shape())
    new = int(call.arg("dim", 0)) % (rank + 1)
    each: Map = tuple(d if d < new else d + 1 for d in range(rank))
    return call.flow(*(each for _ in call.operands))


def pad(call: Call) -> Flow | None:
    """Dimensions with padding change (last first in ``pad``), the others stay."""
    rank = len(call.shape())
    amounts: list[Any] = list(call.arg("pad"))
    touched = {rank - 1 - i // 2 for i, a in enumerate(amounts) if not (isinstance(a, int) and a == 0)}
    return call.flow(mixing(rank, *touched))


def tri(call: Call) -> Flow | None:
    """Upper and lower triangles compare the last two dimensions."""
    rank = len(call.shape())
    return call.flow(mixing(rank, rank - 2, rank - 1))


def flip(call: Call) -> Flow | None:
    rank = len(call.shape())
    return call.flow(mixing(rank, *(int(d) % rank for d in call.arg("dims"))))


def repeat_interleave(call: Call) -> Flow | None:
    if call.arg("dim") is None:
        return None
    return one_dim_mixed(call)


def repeat(call: Call) -> Flow | None:
    """Dimensions that are repeated change; new ones stand in front."""
    new = len(call.result) - len(call.shape())
    times = list(call.arg("repeats"))[new:]
    once = [isinstance(n, int) and n == 1 for n in times]
    return call.flow(tuple(d + new if kept else MIXED for d, kept in enumerate(once)))


def roll(call: Call) -> Flow | None:
    """Dimensions that are rolled change; without any given, the flattened whole is rolled."""
    rank = len(call.shape())
    touched = {int(d) % rank for d in call.arg("dims")} or set(range(rank))
    return call.flow(mixing(rank, *touched))


def made_like(call: Call) -> Flow | None:
    """A new tensor of a given shape: nothing of the operand but its dtype and device is read."""
    return call.flow(tuple(MIXED for _ in call.shape()), repeats=True)


def made(call: Call) -> Flow | None:
    """A new tensor of one value: any piece of it is like any other."""
    return call.flow(repeats=True)


SHAPE_RULES: dict[object, Rule] = {
    **dict.fromkeys((aten.view.default, aten.reshape.default, aten._unsafe_view.default), view),
    **dict.fromkeys((aten.flatten.using_ints, aten.unflatten.int), view),
    **dict.fromkeys((aten.squeeze.dim, aten.squeeze.default, aten.squeeze.dims), view),
    aten.transpose.int: transpose,
    aten.t.default: t,
    aten.permute.default: permute,
    aten.unsqueeze.default: unsqueeze,
    aten.expand.default: expand,
    aten.slice.Tensor: slice_,
    aten.select.int: select,
    aten.slice_scatter.default: slice_scatter,
    aten.select_scatter.default: select_scatter,
    aten.unbind.int: select,
    aten.cat.default: cat,
    aten.stack.default: stack,
    aten.pad.default: pad,
    aten.constant_pad_nd.default: pad,
    aten.flip.default: flip,
    aten.repeat.default: repeat,
    aten.roll.default: roll,
    **dict.fromkeys((aten.tril.default, aten.triu.default), tri),
    **dict.fromkeys(
        (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.narrow.default), one_dim_mixed
    ),
    aten.repeat_interleave.self_int: repeat_interleave,
    **dict.fromkeys(
        (aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default), made_like
    ),
    **dict.fromkeys((aten.zeros.default, aten.ones.default, aten.full.default), made),
}
