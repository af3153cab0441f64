"""What the values of a real tensor are, as a short description, read without a temporary of its size.

Three shapes of value are described: all equal; start + step * k along the only dimension that is not 1;
and, for a matrix, a value that depends on row - column only and changes at a few diagonals (a `tril` of
ones, a band). The last is proven by comparing each block of rows with the rows above it,

    t[r, c] == t[r - 1, c - 1]        for all r, c >= 1,

after which the first row and the first column tell everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST_PIECES = 8  # of a matrix's diagonals; masks have two or three
BLOCK = 1 << 20  # elements compared at a time


@dataclass(frozen=True)
class Ramp:
    """``start + step * k`` along dimension ``dim``; ``step == 0`` for a tensor of one value."""

    start: float
    step: float
    dim: int


@dataclass(frozen=True)
class Bands:
    """Values of a matrix by d = row - column: ``values[n]`` where ``limits[n-1] < d <= limits[n]``."""

    limits: tuple[int, ...]
    values: tuple[float, ...]


def describe(tensor: torch.Tensor) -> Ramp | Bands | None:
    """The description of a real tensor's values, None if it has none of the three shapes."""
    tensor = tensor.detach()
    if tensor.numel() == 0 or tensor.is_complex():
        return None
    long = [d for d, n in enumerate(tensor.shape) if n > 1 and tensor.stride(d) != 0]
    core = tensor[tuple(slice(None) if d in long else 0 for d in range(tensor.dim()))]
    if core.dim() == 0:
        return Ramp(core.item(), 0, 0)
    if core.dim() == 1:
        return _ramp(core, long[0])
    if long == [tensor.dim() - 2, tensor.dim() - 1]:
        return _bands(core)
    return None


def _ramp(vector: torch.Tensor, dim: int) -> Ramp | None:
    start: float = vector[0].item()
    step: float = 0
    if vector.dtype is not torch.bool:
        step = vector[1].item() - start
        if step != step or step in (float("inf"), float("-inf")) or step != int(step):
            return None
    steps = torch.arange(vector.numel(), device=vector.device, dtype=torch.float64) * step
    return Ramp(start, step, dim) if torch.equal(vector.to(torch.float64), steps + start) else None


def _bands(matrix: torch.Tensor) -> Ramp | Bands | None:
    """The bands of a matrix whose values depend on row - column only."""
    rows, columns = matrix.shape
    diagonals = torch.cat([matrix[0].flip(0), matrix[1:, 0]])  # d = 1 - columns .. rows - 1
    changes = torch.nonzero(diagonals[1:] != diagonals[:-1]).flatten()
    if changes.numel() >= MOST_PIECES:
        return None
    step = max(1, BLOCK // columns)
    for top in range(1, rows, step):
        bottom = min(top + step, rows)
        if not torch.equal(matrix[top:bottom, 1:], matrix[top - 1 : bottom - 1, :-1]):
            return None
    if changes.numel() == 0:
        return Ramp(diagonals[0].item(), 0, 0)
    ends = [int(c) for c in changes]
    limits = (*(end + 1 - columns for end in ends), rows - 1)
    return Bands(limits, tuple(diagonals[end].item() for end in (*ends, len(diagonals) - 1)))
