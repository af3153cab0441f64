"""One token from a state: what decoding runs. Plain torch, so that Inductor fuses it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["fused_recurrent"]


def fused_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """``reference`` for T = 1."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    added = k[:, 0, :, :, None].to(dtype) * v[:, 0, :, None, :].to(dtype)
    state = added
    read = added if bonus is None else bonus.to(dtype)[:, :, None] * added
    if initial_state is not None:
        before = initial_state.to(dtype)
        after = before * decay[:, 0, :, :, None].to(dtype).exp()
        state = after + added
        read = state if bonus is None else read + before
    out = (q[:, 0, :, None, :].to(dtype) * scale) @ read
    return out.transpose(1, 2).to(v.dtype), state
