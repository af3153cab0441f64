"""One token from a state: what decoding runs. Plain torch, so that Inductor fuses it."""

from __future__ import annotations

import torch
from torch import Tensor

from mstc.kernels.dplr.reference import step

__all__ = ["fused_recurrent"]


def fused_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``reference`` for T = 1."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, _, heads, key = q.shape
    before = q.new_zeros(batch, heads, key, v.shape[-1], dtype=dtype) if initial_state is None else initial_state
    state, out = step(q, k, v, a, b, decay, before.to(dtype), 0, dtype)
    return (scale * out).unsqueeze(1).to(v.dtype), state
