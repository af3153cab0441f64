"""The algebra of elementwise ops on values.

Arithmetic on integers that are linear in positions is carried out exactly, where the dtype holds every
intermediate; arithmetic on constants is carried out by torch itself, on one element of the op's own dtypes;
a `Choice` is carried through an op branch by branch. Everything else raises `Unread`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch

from mstc.graph.predicates.bounds import Box
from mstc.graph.predicates.call import Call, Unread, dtype_of, is_tensor
from mstc.graph.predicates.terms import (
    FORMULAS,
    Choice,
    Expr,
    Formula,
    Ordered,
    Real,
    Value,
    at_most,
    choose,
    conj,
    constant,
    disj,
    equal,
    negate,
    number,
    same,
)

aten = torch.ops.aten

MOST_BRANCHES = 64  # of one value; a mask has a handful


def branches(value: Value) -> int:
    """How many leaves a tree of choices has."""
    return branches(value.then) + branches(value.other) if isinstance(value, Choice) else 1


def each(function: Callable[..., Value], *values: Value) -> Value:
    """Apply ``function`` to every combination of the values' branches."""
    for n, value in enumerate(values):
        if isinstance(value, Choice):
            if sum(map(branches, values)) > MOST_BRANCHES:
                raise Unread("too many cases")
            then = each(function, *values[:n], value.then, *values[n + 1 :])
            other = each(function, *values[:n], value.other, *values[n + 1 :])
            return choose(value.condition, then, other)
    return function(*values)


def integer(value: Value) -> Expr:
    """A value that is an expression."""
    if isinstance(value, (Real, Choice, *FORMULAS)):
        raise Unread("not an integer")
    return value


def formula(value: Value) -> Formula:
    """A value that is known to be boolean."""
    if not isinstance(value, FORMULAS):
        raise Unread("not a boolean")
    return value


def converted(value: float, dtype: torch.dtype) -> Value:
    """A Python number after its conversion to ``dtype``."""
    kind = torch.float64 if isinstance(value, float) else None
    return number(torch.tensor(value, dtype=kind, device="cpu").to(dtype).item())


def cast(value: Value, source: torch.dtype, target: torch.dtype, box: Box) -> Value:
    """The value after a conversion of dtype."""
    return value if source is target else each(lambda v: _cast(v, source, target, box), value)


def _cast(value: Value, source: torch.dtype, target: torch.dtype, box: Box) -> Value:
    known = constant(value)
    if known is not None:
        return converted(known, target)
    if isinstance(value, FORMULAS):
        return choose(value, sympy.Integer(1), sympy.Integer(0))
    if target is torch.bool:
        return negate(_compare_integers(aten.eq, integer(value), sympy.Integer(0), source, box))
    exact = integer(value)
    if box.is_closed(exact):
        if box.fits(exact, target):
            return exact
    elif exact.is_Symbol and _includes(target, source):
        return exact
    raise Unread(f"a conversion from {source} to {target} may round or wrap")


def _includes(target: torch.dtype, source: torch.dtype) -> bool:
    """Whether every value of an integer dtype is one of another."""
    if any(d.is_floating_point or d.is_complex or d is torch.bool for d in (target, source)):
        return False
    small, large = torch.iinfo(source), torch.iinfo(target)
    return large.min <= small.min and small.max <= large.max


# ------------------------------------------------------------------ comparisons

_ORDER: Mapping[Any, tuple[bool, bool]] = {
    aten.le: (False, False),  # low <= high;  (swap the operands, negate)
    aten.ge: (True, False),
    aten.lt: (True, True),
    aten.gt: (False, True),
}
_PYTHON = {
    aten.eq: operator.eq,
    aten.ne: operator.ne,
    aten.le: operator.le,
    aten.lt: operator.lt,
    aten.ge: operator.ge,
    aten.gt: operator.gt,
}


def compare(op: Any, a: Value, b: Value, dtype: torch.dtype, box: Box) -> Value:
    """``a op b`` of two values of one dtype."""

    def one(x: Value, y: Value) -> Value:
        first, second = constant(x), constant(y)
        if first is not None and second is not None:
            return number(bool(_PYTHON[op](first, second)))
        if dtype is not torch.bool:
            return _compare_integers(op, integer(x), integer(y), dtype, box)
        if op not in (aten.eq, aten.ne):
            raise Unread("an order of booleans")
        p, q = formula(x), formula(y)
        agree = disj(conj(p, q), conj(negate(p), negate(q)))
        return agree if op is aten.eq else negate(agree)

    return each(one, a, b)


def _compare_integers(op: Any, a: Expr, b: Expr, dtype: torch.dtype, box: Box) -> Formula:
    """A comparison of integers; leaves that are not integers have no rule."""
    closed = box.is_closed(a) and box.is_closed(b)
    if not closed and dtype.is_floating_point:
        raise Unread("floating-point values that are only known at run time are compared")
    if op in (aten.eq, aten.ne):
        result = equal(a - b) if closed else same(a - b)
        return result if op is aten.eq else negate(result)
    swap, inverse = _ORDER[op]
    low, high = (b, a) if swap else (a, b)
    result = at_most(low - high) if closed else Ordered(sympy.expand(low), sympy.expand(high))
    return negate(result) if inverse else result


# ------------------------------------------------------------------ logic and selection


def logic(op: Any, values: Sequence[Value]) -> Value:
    """And, or, exclusive or, not of booleans."""
    terms = [formula(v) for v in values]
    if op in _AND:
        return conj(*terms)
    if op in _OR:
        return disj(*terms)
    if op in _NOT:
        return negate(terms[0])
    first, second = terms
    return disj(conj(first, negate(second)), conj(negate(first), second))


_AND = (aten.logical_and, aten.bitwise_and, aten.__and__)
_OR = (aten.logical_or, aten.bitwise_or, aten.__or__)
_NOT = (aten.logical_not, aten.bitwise_not)
_XOR = (aten.logical_xor, aten.bitwise_xor, aten.__xor__)
LOGICAL = (aten.logical_and, aten.logical_or, aten.logical_not, aten.logical_xor)  # of numbers, too
LOGIC = (*_AND, *_OR, *_NOT, *_XOR)
COMPARISONS = tuple(_PYTHON)


# ------------------------------------------------------------------ arithmetic


def _linear(op: Any, a: Expr, b: Expr, alpha: Expr) -> Expr:
    if op is aten.add:
        return sympy.expand(a + alpha * b)
    if op is aten.sub:
        return sympy.expand(a - alpha * b)
    if op is aten.rsub:
        return sympy.expand(b - alpha * a)
    if op is aten.mul and (a.is_Integer or b.is_Integer):
        return sympy.expand(a * b)
    raise Unread("a product of positions")


def arithmetic(op: Any, x: Value, y: Value, alpha: Value, dtype: torch.dtype, box: Box) -> Value:
    """Sum, difference or product of integers that have already been converted to ``dtype``."""
    found = _linear(op, integer(x), integer(y), integer(alpha))
    if box.is_closed(found):
        if box.fits(found, dtype):
            return found
        raise Unread(f"{dtype} does not hold every value")
    if dtype is torch.int64:
        return found
    raise Unread("values that are only known at run time are combined in a narrow dtype")


def extremum(largest: bool, x: Value, y: Value, box: Box) -> Value:
    """The larger or smaller of two closed integers."""
    a, b = integer(x), integer(y)
    if not (box.is_closed(a) and box.is_closed(b)):
        raise Unread("an extremum of values that are only known at run time")
    return choose(at_most(b - a if largest else a - b), a, b)


def fold(call: Call, values: Mapping[str, Value]) -> Value:
    """Run an op on one element, with the op's own dtypes, if every operand is constant.

    values: of the tensor operands by their names in the schema.
    """
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    target: Any = call.node.target
    for declared, arg in zip(target._schema.arguments, call.args, strict=True):
        if is_tensor(arg):
            known = constant(values[declared.name])
            if known is None:
                raise Unread("not constant")
            arg = torch.full([1] * arg.meta["val"].dim(), known, dtype=dtype_of(arg), device="cpu")
        elif isinstance(arg, torch.fx.Node):
            raise Unread("a scalar is only known at run time")
        if declared.kwarg_only:
            kwargs[declared.name] = arg
        else:
            args.append(arg)
    try:
        with torch.no_grad():
            return number(target(*args, **kwargs).item())
    except RuntimeError as error:  # not every op has a CPU kernel for every dtype
        raise Unread(str(error)) from error
