"""Exact arithmetic on sizes that never adds a guard: ints, or SymInts through their expressions."""

from __future__ import annotations

from typing import Any

import sympy
import torch

Size = Any  # int, or a sympy expression in positive integer symbols


def size(value: Any) -> Size:
    """An int as it is, a SymInt as its sympy expression."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression) if expression.is_Integer else expression
    return value


def shape_of(tensor: torch.Tensor) -> tuple[Size, ...]:
    return tuple(size(s) for s in tensor.shape)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every length (structurally, no guard)."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.simplify(a - b) == 0)


def product(sizes: Any) -> Size:
    result: Size = 1
    for s in sizes:
        result = result * s
    return result


def quotient(a: Size, b: Size) -> Size | None:
    """a / b where b divides a for every length, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b != 0 and a % b == 0 else None
    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    _, denominator = ratio.as_numer_denom()
    if denominator != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio
