"""Sums of log decays, and scans of states over chunks.

For log decays g_1 .. g_C write L_ij = g_{j+1} + .. + g_i (j <= i), the log decay from token j to
token i. L_ij <= 0 when every g <= 0, so exp(L_ij) cannot overflow; entries above the diagonal are
set to 0 before the exponential, and again after it. L is a difference of running sums, taken in
float64: after a decay of -20 per token over a chunk, float32 sums would lose L to about 1e-4.

A log decay below FLOOR is read as FLOOR: exp(FLOOR) is 0 in float64 as well, and -inf (a reset of
the state) then gives no inf - inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FLOOR", "chunk_decays", "pair_decays", "prefix_sum", "scan_states", "segment_gradient", "suffix_sum"]

FLOOR = -1.0e4


def running_sum(g: Tensor) -> Tensor:
    """G_i = g_1 + .. + g_i along the last dimension, in float64."""
    return g.double().clamp(min=FLOOR).cumsum(-1)


def pair_decays(total: Tensor, dtype: torch.dtype) -> Tensor:
    """D_ij = exp(G_i - G_j) for j <= i, else 0, from running sums G [..., C] -> [..., C, C]."""
    sums = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(dtype)
    return sums.tril_().exp_().tril_()


def chunk_decays(total: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """From G [..., C]: exp(G_i) from the chunk's start, exp(G_C - G_j) to its end, G_C itself (float64)."""
    last = total[..., -1]
    return total.to(dtype).exp(), (last.unsqueeze(-1) - total).to(dtype).exp(), last


def suffix_sum(x: Tensor) -> Tensor:
    """y_t = sum of x_i over i >= t, along the last dimension, with positive signs only."""
    size = x.shape[-1]
    return x @ x.new_ones(size, size).tril()


def prefix_sum(x: Tensor) -> Tensor:
    """y_t = sum of x_j over j < t, along the last dimension."""
    size = x.shape[-1]
    return x @ x.new_ones(size, size).triu(1)


def segment_gradient(p: Tensor) -> Tensor:
    """dg_t = sum of P_ij over j < t <= i, for P = dD * D [..., C, C].

    The direct form: every pair that spans t, added up. A reversed running sum of row sums minus
    column sums is the same in exact arithmetic, but subtracts large numbers to leave small ones.
    """
    size = p.shape[-1]
    return (p.new_ones(size, size).triu() @ p).tril_(-1).sum(-1)


def scan_states(decay: Tensor | None, added: Tensor, initial: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """S_0 .. S_{N-1}, [X, N, K, V], and S_N, with S_n = exp(c_n) S_{n-1} + B_n from S_0 = ``initial``.

    decay: c [X, N] or None for 0; added: B [X, N, K, V]; initial [X, K, V]. In reverse S_1 .. S_N and S_0, with
    S_{n-1} = exp(c_n) S_n + B_n from S_N = ``initial``: the gradient of the scan. The last one stands apart, since
    a product would copy a slice of them all.
    """
    factors = None if decay is None else decay.to(added.dtype).exp()[..., None, None]
    states, order = [initial], range(added.shape[1])
    for n in reversed(order) if reverse else order:
        last = states[-1]
        states.append(added[:, n] + last if factors is None else torch.addcmul(added[:, n], factors[:, n], last))
    *seen, last = states
    return torch.stack(seen[::-1] if reverse else seen, 1), last
