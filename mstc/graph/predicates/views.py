"""Reading through views: where in its input an element of a view stands.

Each rule maps (call, index of the output) to (input, index of the input):

    out[..., k, ...] = in[..., f(k), ...]

`Unread` is raised where that index is no linear expression.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc.graph.predicates.bounds import Box, is_nonnegative
from mstc.graph.predicates.call import Call, Unread, shape_of, size
from mstc.graph.predicates.terms import Expr

aten = torch.ops.aten

Index = tuple[Expr, ...]


def broadcast(shape: Sequence[Expr], index: Index) -> Index:
    """The index into an operand of ``shape`` for an index into the broadcast result."""
    if len(shape) > len(index):
        raise Unread("an operand has more dimensions than the result")
    aligned = index[len(index) - len(shape) :]
    return tuple(sympy.Integer(0) if extent == 1 else k for extent, k in zip(shape, aligned, strict=True))


def _same(call: Call, box: Box, index: Index) -> Index:
    return index


def _expand(call: Call, box: Box, index: Index) -> Index:
    return broadcast(shape_of(call.node_arg(0)), index)


def _unsqueeze(call: Call, box: Box, index: Index) -> Index:
    dim = call.args[1] % len(index)
    return index[:dim] + index[dim + 1 :]


def _squeeze(call: Call, box: Box, index: Index) -> Index:
    shape = shape_of(call.node_arg(0))
    given = call.args[1] if len(call.args) > 1 else range(len(shape))
    dims = {d % len(shape) for d in ([given] if isinstance(given, int) else given)}
    rest = iter(index)
    return tuple(sympy.Integer(0) if d in dims and n == 1 else next(rest) for d, n in enumerate(shape))


def _permute(call: Call, box: Box, index: Index) -> Index:
    return _unpermute([d % len(index) for d in call.args[1]], index)


def _transpose(call: Call, box: Box, index: Index) -> Index:
    order = list(range(len(index)))
    first, second = call.args[1] % len(index), call.args[2] % len(index)
    order[first], order[second] = second, first
    return _unpermute(order, index)


def _t(call: Call, box: Box, index: Index) -> Index:
    return index[::-1]


def _unpermute(order: Sequence[int], index: Index) -> Index:
    return tuple(index[order.index(d)] for d in range(len(index)))


def _slice(call: Call, box: Box, index: Index) -> Index:
    dim = call.args[1] % len(index)
    start = sympy.Integer(0) if call.args[2] is None else size(call.args[2])
    if not is_nonnegative(start):
        extent = shape_of(call.node_arg(0))[dim]
        if not (start.is_Integer and extent.is_Integer):
            raise Unread("a slice starts at an unknown place")
        start = max(start + extent, sympy.Integer(0))
    return (*index[:dim], start + size(call.args[4]) * index[dim], *index[dim + 1 :])


def _select(call: Call, box: Box, index: Index) -> Index:
    shape = shape_of(call.node_arg(0))
    dim, at = call.args[1] % len(shape), size(call.args[2])
    if not is_nonnegative(at):
        if not is_nonnegative(-1 - at):
            raise Unread("an element is picked at an unknown place")
        at = at + shape[dim]
    return (*index[:dim], at, *index[dim:])


def _flip(call: Call, box: Box, index: Index) -> Index:
    shape = shape_of(call.node_arg(0))
    dims = {d % len(shape) for d in call.args[1]}
    return tuple(n - 1 - k if d in dims else k for d, (n, k) in enumerate(zip(shape, index, strict=True)))


def _repeat(call: Call, box: Box, index: Index) -> Index:
    shape = shape_of(call.node_arg(0))
    aligned = zip(shape, index[len(index) - len(shape) :], shape_of(call.node)[len(index) - len(shape) :], strict=True)
    return tuple(sympy.Integer(0) if n == 1 else k if n == m else _divide(k, n, box)[1] for n, k, m in aligned)


def _view(call: Call, box: Box, index: Index) -> Index:
    """Dimensions are split and merged in groups of equal size; ``k = k1 * n2 + k2``."""
    old, new = list(shape_of(call.node_arg(0))), list(shape_of(call.node))
    found: list[Expr] = []
    a = b = 0
    while a < len(old) or b < len(new):
        a_end, b_end = _group(old, new, a, b)
        flat: Expr = sympy.Integer(0)
        for extent, k in zip(new[b:b_end], index[b:b_end], strict=True):
            flat = flat * extent + k
        found += _unflatten(sympy.expand(flat), old[a:a_end], box)
        a, b = a_end, b_end
    return tuple(found)


def _group(old: list[Expr], new: list[Expr], a: int, b: int) -> tuple[int, int]:
    """The smallest group of old and new dimensions from (a, b) on that hold equally many elements."""
    left: Expr = sympy.Integer(1)
    right: Expr = sympy.Integer(1)
    while True:
        if a < len(old) and old[a] == 1 and left == right:
            return a + 1, b
        if b < len(new) and new[b] == 1 and left == right:
            return a, b + 1
        grow_left = a < len(old) and (left == 1 or b == len(new) or is_nonnegative(right - left))
        if grow_left:
            left, a = sympy.expand(left * old[a]), a + 1
        elif b < len(new):
            right, b = sympy.expand(right * new[b]), b + 1
        else:
            raise Unread("a view regroups dimensions of unknown size")
        if left == right:
            return a, b


def _unflatten(flat: Expr, shape: list[Expr], box: Box) -> list[Expr]:
    """The index into ``shape`` of the element at position ``flat`` of its row-major order."""
    found: list[Expr] = []
    for extent in reversed(shape[1:]):
        flat, rest = _divide(flat, extent, box)
        found.append(rest)
    if shape:
        found.append(flat)
    return found[::-1]


def _divide(expr: Expr, by: Expr, box: Box) -> tuple[Expr, Expr]:
    """Quotient and remainder of an index by a size, where both are linear.

    The terms that ``by`` divides make up the quotient if the others stay within 0..by-1.
    """
    quotient: Expr = sympy.Integer(0)
    rest: Expr = sympy.Integer(0)
    for term in sympy.Add.make_args(sympy.expand(expr)):
        ratio = sympy.cancel(term / by)
        if _is_integral(ratio):
            quotient += ratio
        else:
            rest += term
    if not (box.never_above(-rest) and box.never_above(rest - by + 1)):
        raise Unread("a view mixes two positions")
    return quotient, rest


def _is_integral(ratio: Expr) -> bool:
    """Whether an expression is a polynomial with integer coefficients."""
    if not ratio.free_symbols:
        return bool(ratio.is_Integer)
    return bool(ratio.is_polynomial()) and all(c.is_Integer for c in sympy.Poly(ratio, *ratio.free_symbols).coeffs())


VIEWS: Mapping[Any, Callable[[Call, Box, Index], Index]] = {
    aten.alias: _same,
    aten.clone: _same,
    aten.contiguous: _same,
    aten.detach: _same,
    aten.lift_fresh_copy: _same,
    aten.expand: _expand,
    aten.expand_as: _expand,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    aten.permute: _permute,
    aten.transpose: _transpose,
    aten.t: _t,
    aten.slice: _slice,
    aten.select: _select,
    aten.flip: _flip,
    aten.repeat: _repeat,
    aten.view: _view,
    aten.reshape: _view,
    aten._unsafe_view: _view,
    aten.unflatten: _view,
    aten.flatten: _view,
}


def pull_back(call: Call, box: Box, index: Index) -> tuple[fx.Node, Index] | None:
    """Input and index that a view's element stands for, None if the op is no view."""
    rule = VIEWS.get(call.op)
    if rule is None:
        return None
    source = call.node_arg(0)
    found = rule(call, box, index)
    if len(found) != len(shape_of(source)):
        raise Unread("a view was misread")
    return source, found
