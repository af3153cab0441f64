"""The structure of a mask: which diagonals it keeps, and what must hold besides.

With d = i - j (query minus key), every atom that reads i and j only through d is a half-line of d. The
half-lines' ends cut the line of diagonals into cells; inside a cell each of them is decided, so the formula
is one of the other atoms only. The mask has structure if the cells that are not false lie together and say
the same:

    mask(i, j)  <=>  low <= i - j <= high  and  rest(i, j)

The ends are integers, so this is exact whether sizes are numbers or symbols; cells beyond the matrix
(d > Q - 1 or d < 1 - K) are left out where the sizes prove it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy

from mstc.graph.predicates.bounds import Box, is_nonnegative
from mstc.graph.predicates.reading import Reading
from mstc.graph.predicates.runs import use_runs
from mstc.graph.predicates.terms import (
    FALSE,
    AtMost,
    Expr,
    Formula,
    Truth,
    atoms,
    map_atoms,
)

MOST_CELLS = 32


@dataclass(frozen=True)
class Structure:
    """``low <= i - j <= high and rest``; None: no limit on that side. `empty` masks keep nothing."""

    low: int | None
    high: int | None
    rest: Formula


@dataclass(frozen=True)
class Cell:
    """The diagonals from ``low`` to ``high`` and what the mask says there."""

    low: int | None
    high: int | None
    says: Formula


def settle(term: Formula, box: Box) -> Formula:
    """The formula with every atom that the extents decide decided."""

    def decide(atom: Formula) -> Formula:
        if isinstance(atom, AtMost):
            if box.never_above(atom.expr):
                return Truth(True)
            if box.never_above(1 - atom.expr):
                return FALSE
        return atom

    return map_atoms(term, decide)


def structure_of(term: Formula, i: Expr, j: Expr, reader: Reading) -> Structure | None:
    """The structure of a mask that says ``term`` of query i and key j, None if it has none."""
    box = reader.box
    term = use_runs(settle(term, box), reader)
    found = cells(term, i, j, box)
    kept = [n for n, cell in enumerate(found) if cell.says != FALSE]
    if not kept:
        return None
    first, last = kept[0], kept[-1]
    if any(cell.says != found[first].says for cell in found[first : last + 1]):
        return None
    # A first cell that is not false reaches to the matrix's edge, wherever that is.
    low = found[first].low if first > 0 else None
    high = found[last].high if last + 1 < len(found) else None
    return Structure(low, high, found[first].says)


def cells(term: Formula, i: Expr, j: Expr, box: Box) -> list[Cell]:
    """The cells of diagonals, from the key side to the query side; neighbours that say the same are one."""
    limits = {atom: _limit(atom, i, j) for atom in atoms(term) if isinstance(atom, AtMost)}
    ends = sorted({limit.end for limit in limits.values() if limit is not None})
    if len(ends) > MOST_CELLS:
        return [Cell(None, None, term)]
    found: list[Cell] = []
    for low, high in zip([None, *(e + 1 for e in ends)], [*ends, None], strict=True):
        if _outside(low, high, box.extent[i], box.extent[j]):
            continue
        says = map_atoms(term, _decider(limits, low))
        if found and found[-1].says == says:
            found[-1] = Cell(found[-1].low, high, says)
        else:
            found.append(Cell(low, high, says))
    return found


@dataclass(frozen=True)
class _Limit:
    """The half-line ``d <= end``, or its complement."""

    end: int
    below: bool


def _limit(atom: AtMost, i: Expr, j: Expr) -> _Limit | None:
    """The half-line that ``k * (i - j) + c <= 0`` stands for, None for any other atom."""
    slope = atom.expr.coeff(i, 1)
    offset = sympy.expand(atom.expr - slope * (i - j))
    if not (slope.is_Integer and offset.is_Integer) or slope == 0:
        return None
    k, c = int(slope), int(offset)
    if k > 0:
        return _Limit(-c // k, True)  # d <= floor(-c / k)
    return _Limit(-(c // k) - 1, False)  # d >= ceil(c / -k) = -floor(c / k)


def _decider(limits: dict[AtMost, _Limit | None], low: int | None) -> Callable[[Formula], Formula]:
    """What the half-lines say of a cell that begins at ``low``; no end lies inside a cell."""

    def decide(atom: Formula) -> Formula:
        limit = limits.get(atom) if isinstance(atom, AtMost) else None
        if limit is None:
            return atom
        return Truth((low is None or low <= limit.end) == limit.below)

    return decide


def _outside(low: int | None, high: int | None, queries: Expr, keys: Expr) -> bool:
    """Whether no diagonal of the matrix (1 - keys .. queries - 1) lies in a cell, for every size."""
    return (low is not None and is_nonnegative(sympy.Integer(low) - queries)) or (
        high is not None and is_nonnegative(-keys - high)
    )
