"""How the reader carries out elementwise ops: the operands at one index, then their algebra.

Each rule is (reader, call, index) -> value and raises `Unread` where it has no answer. Constants go
through torch itself first, so that rounding and promotion are the op's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc.graph.predicates import pointwise
from mstc.graph.predicates.call import Call, Unread, dtype_of, is_tensor
from mstc.graph.predicates.reading import Index, Reading
from mstc.graph.predicates.terms import Truth, Value, choose, number

aten = torch.ops.aten

Rule = Callable[[Reading, Call, Index], Value]


def _folded_else(rule: Rule) -> Rule:
    """``rule`` for what is not constant."""

    def folded(reader: Reading, call: Call, index: Index) -> Value:
        try:
            return _fold(reader, call, index)
        except Unread:
            return rule(reader, call, index)

    return folded


def _fold(reader: Reading, call: Call, index: Index) -> Value:
    names = [name for name, arg in zip(call.names, call.args, strict=True) if is_tensor(arg)]
    operands = [reader.operand(call.get(name), index)[0] for name in names]
    return pointwise.each(lambda *values: pointwise.fold(call, dict(zip(names, values, strict=True))), *operands)


def _exact(reader: Reading, arg: object, index: Index, dtype: torch.dtype) -> Value:
    """An operand in the dtype in which the op computes; a scalar must be exact in it."""
    value, own = reader.operand(arg, index)
    if own is not None:
        return pointwise.cast(value, own, dtype, reader.box)
    if isinstance(value, Truth):
        return pointwise.cast(value, torch.bool, dtype, reader.box)
    if not reader.box.fits(pointwise.integer(value), dtype):
        raise Unread("a scalar is not exact in the dtype of the op")
    return value


def _rounded(reader: Reading, arg: object, index: Index, dtype: torch.dtype) -> Value:
    """A value that the op itself converts to ``dtype``, as a fill does."""
    if isinstance(arg, bool | int | float):
        return pointwise.converted(arg, dtype)
    return _exact(reader, arg, index, dtype)


def _arithmetic(reader: Reading, call: Call, index: Index) -> Value:
    dtype = dtype_of(call.node)
    alpha = call.get("alpha")
    if isinstance(alpha, fx.Node):
        raise Unread("a factor is only known at run time")
    factor = number(1 if alpha is None else alpha)
    a, b = (_exact(reader, call.args[n], index, dtype) for n in (0, 1))
    return pointwise.each(lambda x, y: pointwise.arithmetic(call.op, x, y, factor, dtype, reader.box), a, b)


def _compare(reader: Reading, call: Call, index: Index) -> Value:
    common = torch.result_type(*(_sample(call.args[n]) for n in (0, 1)))
    a, b = (_exact(reader, call.args[n], index, common) for n in (0, 1))
    return pointwise.compare(call.op, a, b, common, reader.box)


def _sample(arg: object) -> Any:
    """Something that promotes as ``arg`` does: an empty tensor (0-dimensional where it is), or the scalar."""
    if isinstance(arg, fx.Node) and is_tensor(arg):
        return torch.empty([0] if arg.meta["val"].dim() else [], dtype=dtype_of(arg), device="cpu")
    return arg if isinstance(arg, bool | int | float) else 1


def _logic(reader: Reading, call: Call, index: Index) -> Value:
    values = []
    for arg in call.args:
        value, dtype = reader.operand(arg, index)
        if dtype not in (torch.bool, None) and call.op not in pointwise.LOGICAL:
            raise Unread("bits of integers")
        values.append(pointwise.cast(value, dtype, torch.bool, reader.box) if dtype is not None else value)
    return pointwise.logic(call.op, values)


def _where(reader: Reading, call: Call, index: Index) -> Value:
    condition, kind = reader.operand(call.args[0], index)
    assert kind is not None
    holds = pointwise.formula(pointwise.cast(condition, kind, torch.bool, reader.box))
    then, other = (_rounded(reader, call.args[n], index, dtype_of(call.node)) for n in (1, 2))
    return choose(holds, then, other)


def _masked_fill(reader: Reading, call: Call, index: Index) -> Value:
    holds = pointwise.formula(reader.operand(call.args[1], index)[0])
    kept, filled = (_rounded(reader, call.args[n], index, dtype_of(call.node)) for n in (0, 2))
    return choose(holds, filled, kept)


def _convert(reader: Reading, call: Call, index: Index) -> Value:
    return _exact(reader, call.args[0], index, dtype_of(call.node))


def _copy(reader: Reading, call: Call, index: Index) -> Value:
    return _exact(reader, call.args[1], index, dtype_of(call.node))


def _negative(reader: Reading, call: Call, index: Index) -> Value:
    """``-x``, and ``|x|`` as the larger of x and -x, of a closed integer."""
    dtype = dtype_of(call.node)

    def minus(value: Value) -> Value:
        return pointwise.arithmetic(aten.sub, sympy.Integer(0), value, sympy.Integer(1), dtype, reader.box)

    def absolute(value: Value) -> Value:
        return pointwise.extremum(True, value, minus(value), reader.box)

    return pointwise.each(minus if call.op is aten.neg else absolute, _exact(reader, call.args[0], index, dtype))


def _extremum(reader: Reading, call: Call, index: Index) -> Value:
    a, b = (_exact(reader, call.args[n], index, dtype_of(call.node)) for n in (0, 1))
    largest = call.op is aten.maximum
    return pointwise.each(lambda x, y: pointwise.extremum(largest, x, y, reader.box), a, b)


# Ops in which the sign of a zero cannot be told, so that constants may be carried as numbers.
_ONLY_CONSTANTS = (
    aten.clamp,
    aten.clamp_min,
    aten.clamp_max,
    aten.exp,
    aten.log,
    aten.relu,
    aten.sign,
    aten.floor,
    aten.isinf,
    aten.isneginf,
    aten.isnan,
    aten.isfinite,
)

RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(_ONLY_CONSTANTS, _fold),
    **dict.fromkeys((aten.add, aten.sub, aten.rsub, aten.mul), _folded_else(_arithmetic)),
    **dict.fromkeys(pointwise.COMPARISONS, _folded_else(_compare)),
    **dict.fromkeys(pointwise.LOGIC, _logic),
    **dict.fromkeys((aten.neg, aten.abs), _folded_else(_negative)),
    **dict.fromkeys((aten.maximum, aten.minimum), _folded_else(_extremum)),
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten._to_copy: _convert,
    aten.to: _convert,
    aten.type_as: _convert,
    aten.copy: _copy,
}
