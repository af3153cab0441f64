"""One token from a state: what decoding runs. Plain torch, so that Inductor fuses it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fused_recurrent"]


def fused_recurrent(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``reference`` for T = 1: S = exp(g) S + k^T v, o = scale * q S."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = k[:, 0, :, :, None].to(dtype) * v[:, 0, :, None, :].to(dtype)
    if initial_state is not None:
        kept = initial_state.to(dtype)
        state = state + (kept if decay is None else kept * decay[:, 0, :, None, None].to(dtype).exp())
    out = (q[:, 0, :, None, :].to(dtype) * scale) @ state
    return out.transpose(1, 2).to(v.dtype), state
