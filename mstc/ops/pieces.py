"""Cutting tensors along an axis that is a factor of a dimension, and laying the pieces out densely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mstc.graph.costs import hint
from mstc.graph.sizes import Size, shape_of
from mstc.ops.pages import empty_strided


@dataclass(frozen=True)
class Cut:
    """Where the axis stands: size(dim) = outer * n * inner, row-major (see `mstc.graph.places.Place`)."""

    dim: int
    outer: Size
    inner: Size

    def view(self, x: torch.Tensor, n: int, start: int, length: int) -> torch.Tensor:
        """The indices ``start .. start + length`` of the axis, as a view with the axis as its own dimension."""
        if self.outer == 1:
            return x.narrow(self.dim, start * self.inner, length * self.inner)
        return self._apart(x, n).narrow(self.dim + 1, start, length)

    def read(self, x: torch.Tensor, n: int, start: int, length: int) -> torch.Tensor:
        """The same indices in the tensor's own number of dimensions; a copy where that needs one."""
        piece = self.view(x, n, start, length)
        return piece if self.outer == 1 else piece.flatten(self.dim, self.dim + 2)

    def write(self, x: torch.Tensor, n: int, start: int, length: int, piece: torch.Tensor) -> None:
        """Store a piece (in the tensor's own number of dimensions) at these indices."""
        if self.outer != 1:
            piece = self._apart(piece, length)
        self.view(x, n, start, length).copy_(piece)

    def _apart(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """The dimension split into its three factors."""
        return x.view(*x.shape[: self.dim], self.outer, n, self.inner, *x.shape[self.dim + 1 :])

    def shape(self, whole: Sequence[Any], length: int) -> tuple[Any, ...]:
        """Shape of a piece of that many indices."""
        shape = list(whole)
        shape[self.dim] = self.outer * length * self.inner
        return tuple(shape)


def order_of(x: torch.Tensor) -> tuple[int, ...]:
    """Dimensions from the slowest to the fastest in memory.

    Dimensions of size 1 keep their own positions, so that a contiguous tensor's order is its own; where a
    broadcast dimension hides the order, it is the contiguous one. Dynamic sizes are ordered as in the example.
    """
    natural = tuple(range(x.dim()))
    wide = [d for d, n in enumerate(shape_of(x)) if n != 1]
    strides = [hint(s) for s in x.stride()]
    if any(strides[d] == 0 for d in wide):
        return natural
    by_stride = iter(sorted(wide, key=lambda d: (-strides[d], d)))
    return tuple(next(by_stride) if d in wide else d for d in natural)


def dense_strides(shape: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor of that shape without gaps, its dimensions laid out in ``order``."""
    strides = [0] * len(shape)
    step = 1
    for d in reversed(order):
        strides[d] = step
        step = step * (shape[d] if not isinstance(shape[d], int) else max(shape[d], 1))
    return tuple(strides)


def dense(x: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """``x`` itself where it lies densely in ``order`` and holds its own numbers, else a copy that does.

    A conjugate may be a view with a mark; bodies are compiled for tensors without one.
    """
    want = dense_strides(x.shape, order)
    marked = x.is_conj() or x.is_neg()
    if not marked and all(a == b for a, b, n in zip(x.stride(), want, x.shape, strict=True) if n != 1):
        # Strides of dimensions of size 1 reach no element, but kernels read a memory format off all strides.
        return x if x.stride() == want else x.as_strided(x.shape, want)
    return empty_strided(x.shape, want, x.dtype, x.device).copy_(x)


def empty(shape: Sequence[int], order: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return empty_strided(shape, dense_strides(shape, order), dtype, device)


def balanced(n: int, count: int) -> list[tuple[int, int]]:
    """(start, length) of ``count`` chunks whose lengths differ by at most one, longer ones first."""
    base, longer = divmod(n, count)
    chunks = []
    start = 0
    for i in range(count):
        length = base + (1 if i < longer else 0)
        chunks.append((start, length))
        start += length
    return chunks
