"""The inverse of a unit lower triangular matrix, and the scan of a matrix recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_unit_lower", "scan_matrices"]


def inverse_unit_lower(strict: Tensor) -> Tensor:
    """(I + L)^-1 for strictly lower triangular L [..., C, C], by forward substitution (stable: no powers of L)."""
    one = torch.eye(strict.shape[-1], dtype=strict.dtype, device=strict.device).expand_as(strict)
    inverse: Tensor = torch.linalg.solve_triangular(strict, one, upper=False, unitriangular=True)
    return inverse


def scan_matrices(matrices: Tensor, added: Tensor, initial: Tensor) -> list[Tensor]:
    """S_0 .. S_N with S_n = M_n S_{n-1} + B_n; M [X, N, K, K], B [X, N, K, V], S_0 [X, K, V]."""
    states = [initial]
    for n in range(added.shape[1]):
        states.append(torch.baddbmm(added[:, n], matrices[:, n], states[-1]))
    return states
