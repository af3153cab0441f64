"""Exact arithmetic on sizes that never adds a guard: ints, or SymInts through their expressions."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

Size = Any  # int, or a sympy expression in positive integer symbols

# PyTorch's own functions of sizes: of padding to whole pieces, n + -n % 4, of a window, min(n, 16), of a share,
# int(0.75 * n), math.ceil(n / 5), round(n / 3).
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "IntTrueDiv": operator.truediv,
    "FloatTrueDiv": operator.truediv,
    "ToFloat": torch.sym_float,
    "TruncToInt": torch.sym_int,
    "FloorToInt": math.floor,
    "CeilToInt": math.ceil,
    "RoundToInt": round,
}


def size(value: Any) -> Size:
    """An int as it is, a SymInt as its sympy expression."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression) if expression.is_Integer else expression
    return value


def shape_of(tensor: torch.Tensor) -> tuple[Size, ...]:
    return tuple(size(s) for s in tensor.shape)


class UnknownSize(ValueError):
    """A size is made by a function of the lengths that `evaluate` does not know."""


def symbols_of(sizes: Iterable[Size]) -> tuple[sympy.Symbol, ...]:
    """The lengths that occur in these sizes, by name."""
    found = {s for size in sizes if isinstance(size, sympy.Basic) for s in size.free_symbols}
    return tuple(sorted(found, key=str))


def evaluate(size: Size, values: Mapping[sympy.Symbol, Any]) -> Any:
    """The size for these values of its lengths: ints, SymInts or `fx.Proxy` (whose arithmetic is recorded).

    Raises `UnknownSize` for anything but sums, products, whole powers and ``_FUNCTIONS``.
    """
    if isinstance(size, int):
        return size
    if size.is_Symbol:
        return values[size]
    if size.is_Integer:
        return int(size)
    if size.is_Float:
        return float(size)
    if not _is_known(size):
        raise UnknownSize(
            f"the size {size} is no sum, product, quotient, remainder, maximum, minimum or rounding of lengths"
        )
    parts = [evaluate(a, values) for a in size.args]
    if size.is_Add:
        return functools.reduce(operator.add, parts)
    if size.is_Mul:
        return functools.reduce(operator.mul, parts)
    if size.is_Pow:
        return functools.reduce(operator.mul, [parts[0]] * parts[1])
    function = _FUNCTIONS[_name(size)]
    return functools.reduce(function, parts) if len(parts) > 1 else _apply(function, parts[0])


def _apply(function: Callable[[Any], Any], value: Any) -> Any:
    """``function`` of the value; recorded where that is a proxy, which Python's own functions do not take."""
    if isinstance(value, fx.Proxy):
        return value.tracer.create_proxy("call_function", function, (value,), {})
    return function(value)


def can_evaluate(size: Size) -> bool:
    """Whether `evaluate` knows all that the size is made of."""
    if isinstance(size, int) or size.is_Symbol or size.is_Integer or size.is_Float:
        return True
    return _is_known(size) and all(map(can_evaluate, size.args))


def _is_known(size: Size) -> bool:
    """Whether the outermost function is one of those that `evaluate` carries out."""
    if size.is_Pow:
        return bool(size.args[1].is_Integer and size.args[1] > 0)
    return bool(size.is_Add or size.is_Mul) or _name(size) in _FUNCTIONS


def _name(size: sympy.Basic) -> str:
    return type(size).__name__


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for every length (structurally, no guard)."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return a == b or _equal(a, b)


@functools.lru_cache(maxsize=4096)
def _equal(a: Size, b: Size) -> bool:
    return bool(sympy.expand(a - b) == 0)


def product(sizes: Any) -> Size:
    result: Size = 1
    for s in sizes:
        result = result * s
    return result


def quotient(a: Size, b: Size) -> Size | None:
    """a / b where b divides a for every length, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b != 0 and a % b == 0 else None
    return _ratio(a, b)


@functools.lru_cache(maxsize=4096)
def _ratio(a: Size, b: Size) -> Size | None:
    ratio = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    _, denominator = ratio.as_numer_denom()
    if denominator != 1:
        return None
    return int(ratio) if ratio.is_Integer else ratio
