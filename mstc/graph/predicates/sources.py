"""Where values come from: iotas, constants, described buffers, and ops that place one tensor inside another.

Each rule is (reader, call, index) -> value and raises `Unread` where it has no answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc.graph.predicates import pointwise, runs
from mstc.graph.predicates.bounds import is_nonnegative
from mstc.graph.predicates.call import Call, Unread, dtype_of, is_tensor, shape_of, size
from mstc.graph.predicates.constants import Bands, Ramp
from mstc.graph.predicates.reading import Index, Reading
from mstc.graph.predicates.terms import Expr, Holds, Value, at_most, choose, conj, constant, number
from mstc.graph.predicates.views import broadcast

aten = torch.ops.aten

Rule = Callable[[Reading, Call, Index], Value]


def described(description: Ramp | Bands, index: Index) -> Value:
    """What a buffer of described values holds at ``index``."""
    if isinstance(description, Bands):
        diagonal = index[-2] - index[-1]
        *earlier, value = map(number, description.values)
        for limit, piece in reversed(list(zip(description.limits, earlier, strict=False))):
            value = choose(at_most(diagonal - limit), piece, value)
        return value
    start = number(description.start)
    if description.step == 0:
        return start
    return sympy.expand(pointwise.integer(start) + int(description.step) * index[description.dim])


def _arange(reader: Reading, call: Call, index: Index) -> Value:
    start, step = (_whole(call.get(name), default) for name, default in (("start", 0), ("step", 1)))
    value = sympy.expand(start + step * index[0])
    if not reader.box.fits(value, dtype_of(call.node)):
        raise Unread("an iota is not exact in its dtype")
    return value


def _whole(arg: object, default: int) -> Expr:
    """A scalar argument that must be an integer."""
    if isinstance(arg, float):
        arg = int(arg) if arg.is_integer() else None
        if arg is None:
            raise Unread("an iota steps between integers")
    return size(default if arg is None else arg)


def _fill(name: str) -> Rule:
    """A tensor filled with its argument ``name``."""

    def rule(reader: Reading, call: Call, index: Index) -> Value:
        arg, dtype = call.get(name), dtype_of(call.node)
        if isinstance(arg, fx.Node) and is_tensor(arg):
            value, own = reader.operand(arg, index)
            assert own is not None
            return pointwise.cast(value, own, dtype, reader.box)
        if isinstance(arg, bool | int | float):
            return pointwise.converted(arg, dtype)
        value = size(arg)
        if not reader.box.fits(value, dtype):
            raise Unread("a size does not fit the dtype")
        return value

    return rule


def _ones(reader: Reading, call: Call, index: Index) -> Value:
    return pointwise.converted(1, dtype_of(call.node))


def _zeros(reader: Reading, call: Call, index: Index) -> Value:
    return pointwise.converted(0, dtype_of(call.node))


def _triangle(lower: bool) -> Rule:
    """``tril`` keeps column - row <= diagonal, ``triu`` keeps column - row >= diagonal; the rest is 0."""

    def rule(reader: Reading, call: Call, index: Index) -> Value:
        beyond = index[-1] - index[-2] - size(call.args[1])
        kept = at_most(beyond if lower else -beyond)
        return choose(kept, reader.value(call.node_arg(0), index), pointwise.converted(0, dtype_of(call.node)))

    return rule


def _index(reader: Reading, call: Call, index: Index) -> Value:
    """``vector[..., positions, ...]`` for index tensors whose elements are positions or sizes, never negative.

    The indexed dimensions stand together where they are adjacent, in front otherwise.
    """
    source, given = call.node_arg(0), list(call.args[1])
    dims = [d for d, picked in enumerate(given) if picked is not None]
    tensors = [given[d] for d in dims]
    if not all(is_tensor(t) and dtype_of(t) is not torch.bool for t in tensors):
        raise Unread("an index by a mask")
    rank = max(len(shape_of(t)) for t in tensors)
    first = dims[0] if dims == list(range(dims[0], dims[-1] + 1)) else 0
    inner, outer = index[first : first + rank], iter(index[:first] + index[first + rank :])
    found: list[Expr] = []
    for d in range(len(shape_of(source))):
        if d not in dims:
            found.append(next(outer))
            continue
        at = pointwise.integer(reader.value(given[d], broadcast(shape_of(given[d]), inner)))
        if not (reader.box.is_closed(at) and reader.box.never_above(-at)):
            raise Unread("an index that is only known at run time")
        found.append(at)
    return reader.value(source, tuple(found))


def _moved(index: Index, dim: int, to: Expr) -> Index:
    return (*index[:dim], sympy.expand(to), *index[dim + 1 :])


def _diff(reader: Reading, call: Call, index: Index) -> Value:
    """``x[k] - x[k-1]``, with ``x[-1]`` the one prepended element; ``x[k+1] - x[k]`` without one."""
    source, prepend, dtype = call.node_arg(0), call.get("prepend"), dtype_of(call.node)
    dim = call.get("dim") % len(index)
    if call.get("n") != 1 or call.get("append") is not None or dtype is torch.bool:
        raise Unread("a difference of another form")
    at = index[dim]

    def minus(a: Value, b: Value) -> Value:
        one = sympy.Integer(1)
        return pointwise.each(lambda x, y: pointwise.arithmetic(aten.sub, x, y, one, dtype, reader.box), a, b)

    if prepend is None:
        return minus(reader.value(source, _moved(index, dim, at + 1)), reader.value(source, index))
    if shape_of(prepend)[dim] != 1 or dtype_of(prepend) is not dtype or not reader.box.never_above(-at):
        raise Unread("a difference of another form")
    start = _moved(index, dim, sympy.Integer(0))
    first = minus(reader.value(source, start), reader.value(prepend, start))
    later = minus(reader.value(source, index), reader.value(source, _moved(index, dim, at - 1)))
    return choose(at_most(at), first, later)


def _cumsum(reader: Reading, call: Call, index: Index) -> Value:
    """``sum over t <= k of x[t]``: (k + 1) x for a constant; else a leaf, which may number runs (see `runs`)."""
    source, dtype = call.node_arg(0), dtype_of(call.node)
    if not index:
        raise Unread("a sum over nothing")
    dim = call.args[1] % len(index)
    at = reader.box.position("t", shape_of(source)[dim])
    summand = reader.value(source, (*index[:dim], at, *index[dim + 1 :]))
    known = constant(summand)
    if known is not None and known == known and abs(known) < float("inf") and int(known) == known:
        total = sympy.expand(int(known) * (index[dim] + 1))
        if reader.box.fits(total, dtype):
            return total
    leaf = reader.leaf(call.node, index)
    if dtype_of(source) is torch.bool and not isinstance(leaf, Holds):
        run = runs.run_of(summand, at, index[dim], reader)
        if run is not None:
            reader.runs[leaf] = run
    return leaf


def _cat(reader: Reading, call: Call, index: Index) -> Value:
    """Each part where the index falls into it."""
    parts, dtype = call.args[0], dtype_of(call.node)
    dim = call.args[1] % len(index)
    if any(dtype_of(p) is not dtype or len(shape_of(p)) != len(index) for p in parts):
        raise Unread("a concatenation that converts")
    ends: list[Expr] = []
    for part in parts:
        ends.append((ends[-1] if ends else 0) + shape_of(part)[dim])
    starts = [sympy.Integer(0), *ends]
    value = _part(reader, parts[-1], index, dim, starts[-2])
    for part, start, end in reversed(list(zip(parts[:-1], starts, ends, strict=False))):
        value = choose(at_most(index[dim] + 1 - end), _part(reader, part, index, dim, start), value)
    return value


def _part(reader: Reading, part: fx.Node, index: Index, dim: int, start: Expr) -> Value:
    return reader.value(part, _moved(index, dim, index[dim] - start))


def _slice_scatter(reader: Reading, call: Call, index: Index) -> Value:
    """``source`` where start <= index < start + its length, else the tensor that it is written into."""
    base, written = call.node_arg(0), call.node_arg(1)
    dim = call.args[2] % len(index)
    start = size(0 if call.args[3] is None else call.args[3])
    if not is_nonnegative(start) or size(call.args[5]) != 1 or dtype_of(written) is not dtype_of(base):
        raise Unread("a slice is written at an unknown place")
    at = index[dim]
    inside = conj(at_most(start - at), at_most(at + 1 - start - shape_of(written)[dim]))
    return choose(inside, reader.value(written, _moved(index, dim, at - start)), reader.value(base, index))


RULES: Mapping[Any, Rule] = {
    aten.arange: _arange,
    aten.full: _fill("fill_value"),
    aten.full_like: _fill("fill_value"),
    aten.new_full: _fill("fill_value"),
    aten.scalar_tensor: _fill("s"),
    aten.fill: _fill("value"),
    **dict.fromkeys((aten.ones, aten.ones_like, aten.new_ones), _ones),
    **dict.fromkeys((aten.zeros, aten.zeros_like, aten.new_zeros), _zeros),
    aten.tril: _triangle(True),
    aten.triu: _triangle(False),
    aten.index: _index,
    aten.diff: _diff,
    aten.cumsum: _cumsum,
    aten.cat: _cat,
    aten.slice_scatter: _slice_scatter,
}
