"""Sliding-window softmax attention with sinks, as one masked softmax.

Query i sees key j when j <= i and (i - j < window or j < sinks): the window holds ``window`` keys, the
query's own among them; sinks are the first keys of the sequence (StreamingLLM, Xiao et al. 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference", "visible"]


def visible(queries: Tensor, keys: Tensor, window: int, sinks: int) -> Tensor:
    """Which positions of ``keys`` each position of ``queries`` sees, [len(queries), len(keys)]."""
    i, j = queries.unsqueeze(-1), keys.unsqueeze(0)
    return (j <= i) & ((i - j < window) | (j < sinks))


def reference(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V] -> (o [B, T, H, V], log-sum-exp of the scores [B, T, H])."""
    positions = torch.arange(q.shape[1], device=q.device)
    scores = torch.einsum("bihk,bjhk->bhij", q, k) * scale
    scores = scores.masked_fill(~visible(positions, positions, window, sinks), -torch.inf)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bhij,bjhv->bihv", (scores - lse.unsqueeze(-1)).exp(), v)
    return out, lse.transpose(1, 2)
