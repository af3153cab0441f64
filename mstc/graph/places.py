"""Where an axis stands in a tensor, and how one op carries it from operands to results.

A *place* says that dimension ``dim`` has size ``outer * n * inner`` in row-major order, and that
the middle factor of size n is the axis. Views merge and split dimensions, so outer and inner
need not be 1: the tokens of ``x.view(B * S, D)`` stand at dim 0 with outer B and inner 1.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mstc.graph.sizes import Size, product, quotient, same


@dataclass(frozen=True)
class Place:
    """A factor of one dimension: size(dim) = outer * n * inner."""

    dim: int
    n: Size
    outer: Size = 1
    inner: Size = 1


def same_place(a: Place, b: Place) -> bool:
    """Whether two places are one, sizes compared by what is known of them."""
    return a.dim == b.dim and same(a.n, b.n) and same(a.outer, b.outer) and same(a.inner, b.inner)


def fits(place: Place, extent: object) -> bool:
    """Whether a dimension of this size can hold the place."""
    return same(place.outer * place.n * place.inner, extent)


class Lost(enum.Enum):
    """Why a place of an operand has none in the result."""

    MIXED = "needs the whole axis"
    SUMMED = "sums over the axis"


class Flow(Protocol):
    """How one op carries places. ``operand`` counts the tensor inputs in order of appearance."""

    def carry(self, operand: int, place: Place) -> Place | Lost:
        """The place in the results that depends on this place of the operand, index by index."""

    def back(self, operand: int, place: Place) -> Place | None:
        """Which place of the operand a place of the results needs; None: the operand is shared by all indices."""

    @property
    def repeats(self) -> bool:
        """Whether dimensions of the results that come from no operand hold equal values all along (expand, ones)."""


@dataclass(frozen=True)
class DimFlow:
    """Dimension d of operand i goes to dimension ``maps[i][d]`` of the results, or is lost.

    shapes: of the operands; result: shape of the results. A dimension of size 1 that goes to a
    larger one is broadcast, so it is shared. repeats: see `Flow`.
    """

    maps: tuple[tuple[int | Lost, ...], ...]
    shapes: tuple[tuple[Size, ...], ...]
    result: tuple[Size, ...]
    repeats: bool = False

    def carry(self, operand: int, place: Place) -> Place | Lost:
        target = self.maps[operand][place.dim]
        if isinstance(target, Lost):
            return target
        return Place(target, place.n, place.outer, place.inner)

    def back(self, operand: int, place: Place) -> Place | None:
        for dim, target in enumerate(self.maps[operand]):
            if target == place.dim and not self._broadcast(operand, dim, place.dim):
                return Place(dim, place.n, place.outer, place.inner)
        return None

    def _broadcast(self, operand: int, dim: int, target: int) -> bool:
        return same(self.shapes[operand][dim], 1) and not same(self.result[target], 1)


@dataclass(frozen=True)
class ViewFlow:
    """A reshape in row-major order: a place survives where its factor stays inside one dimension."""

    before: tuple[Size, ...]
    after: tuple[Size, ...]
    repeats: bool = False

    def carry(self, operand: int, place: Place) -> Place | Lost:
        return relocate(place, self.before, self.after) or Lost.MIXED

    def back(self, operand: int, place: Place) -> Place | None:
        return relocate(place, self.after, self.before)


def relocate(place: Place, before: Sequence[Size], after: Sequence[Size]) -> Place | None:
    """The same factor seen through another shape of the same elements, or None where it is split.

    The axis steps over ``stride`` elements, with ``ahead`` combinations of slower factors. In a
    dimension of the new shape with the same two counts, ``outer' = ahead / ahead_of_dim`` and
    ``inner' = stride / stride_of_dim`` must be whole.
    """
    ahead = product(before[: place.dim]) * place.outer
    stride = product(before[place.dim + 1 :]) * place.inner
    for dim, extent in enumerate(after):
        if same(extent, 1) and not same(place.n, 1):
            continue
        outer = quotient(ahead, product(after[:dim]))
        inner = quotient(stride, product(after[dim + 1 :]))
        if outer is not None and inner is not None and same(outer * place.n * inner, extent):
            return Place(dim, place.n, outer, inner)
    return None
