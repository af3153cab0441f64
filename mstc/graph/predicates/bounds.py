"""How large an expression can be, given that each position stays inside its extent.

Positions run over 0..extent-1. Sizes are symbols that torch knows to be positive; nothing is
assumed of others, and no guard is ever added: an unknown sign is None, not a question to the tracer.
"""

from __future__ import annotations

from collections.abc import Mapping

import sympy
import torch

from mstc.graph.predicates.terms import Expr

LARGEST_SIZE = 2**40  # no dimension of a tensor in memory is larger


class Box:
    """The extents of positions, and what follows for expressions over them."""

    def __init__(self) -> None:
        self.extent: dict[Expr, Expr] = {}

    def position(self, name: str, extent: Expr) -> Expr:
        """A new position variable that runs over 0..extent-1."""
        symbol = sympy.Dummy(name, integer=True)
        self.extent[symbol] = sympy.sympify(extent)
        return symbol

    def is_closed(self, expr: Expr) -> bool:
        """Whether ``expr`` holds only positions and sizes, no leaf."""
        return all(s in self.extent or s.is_nonnegative for s in expr.free_symbols)

    def upper(self, expr: Expr) -> Expr | None:
        """A bound over sizes only: ``expr <= upper``, reached at a corner; None if not linear."""
        bound = sympy.expand(expr)
        for symbol in [s for s in bound.free_symbols if s in self.extent]:
            slope = sympy.diff(bound, symbol)
            if slope.free_symbols & self.extent.keys():
                return None
            if is_nonnegative(slope):
                bound = bound.subs(symbol, self.extent[symbol] - 1)
            elif is_nonnegative(-slope):
                bound = bound.subs(symbol, 0)
            else:
                return None
            bound = sympy.expand(bound)
        return bound

    def never_above(self, expr: Expr, limit: int = 0) -> bool:
        """Whether ``expr <= limit`` at every position, for every size."""
        bound = self.upper(expr)
        return bound is not None and is_nonnegative(limit - bound)

    def fits(self, expr: Expr, dtype: torch.dtype) -> bool:
        """Whether every value of a closed expression is an integer that ``dtype`` holds exactly."""
        most = self._magnitude(expr)
        if most is None or dtype.is_complex or dtype is torch.bool:
            return False
        if dtype.is_floating_point:
            return most <= 2 / torch.finfo(dtype).eps
        limits = torch.iinfo(dtype)
        return most <= limits.max and (limits.min < 0 or self.never_above(-expr))

    def _magnitude(self, expr: Expr) -> int | None:
        """A number that no absolute value of ``expr`` exceeds."""
        total = 0
        for term in sympy.Add.make_args(sympy.expand(expr)):
            coefficient, rest = term.as_coeff_Mul()
            if not coefficient.is_Integer:
                return None
            most = abs(int(coefficient))
            for base, power in rest.as_powers_dict().items():
                size = self._largest(base)
                if size is None or not power.is_Integer or power < 0:
                    return None
                most *= size ** int(power)
            total += most
        return total

    def _largest(self, base: Expr) -> int | None:
        if base.is_Integer:
            return abs(int(base))
        if base in self.extent:
            extent = self.extent[base]
            return max(int(extent) - 1, 0) if extent.is_Integer else LARGEST_SIZE
        return LARGEST_SIZE if base.is_Symbol and base.is_nonnegative else None


def is_nonnegative(expr: Expr) -> bool:
    """Whether an expression over sizes is provably at least 0.

    Each size is 1 + t with t >= 0 (t alone where it may be 0); a polynomial in such t without negative
    coefficients is at least 0. Sufficient, not necessary. An empty tensor has no position to be wrong at.
    """
    if expr.is_Integer:
        return bool(expr >= 0)
    sizes = sorted(expr.free_symbols, key=str)
    if not sizes:
        return bool(expr.is_number and expr >= 0)
    if not all(s.is_integer and s.is_nonnegative for s in sizes) or not expr.is_polynomial(*sizes):
        return False
    shifted: Mapping[Expr, Expr] = {s: s + 1 for s in sizes if s.is_positive}
    polynomial = sympy.Poly(expr.subs(shifted, simultaneous=True), *sizes)
    return all(c.is_number and c >= 0 for c in polynomial.coeffs())
