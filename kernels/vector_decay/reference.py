"""Linear attention with a decay per channel, one token at a time.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

(GLA, Yang et al. 2024, eq. 3; HGRN2, Qin et al. 2024, with k_t = 1 - exp(g_t).) With a bonus u
[H, K] the current token is read through u instead of through the state (RWKV6, Peng et al. 2024,
eq. 19):

    o_t = scale * q_t (S_{t-1} + diag(u) k_t^T v_t)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q, k, decay [B, T, H, K], v [B, T, H, V], bonus [H, K] -> (o [B, T, H, V], state [B, H, K, V])."""
    batch, length, heads, key = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = q.new_zeros(batch, heads, key, v.shape[-1], dtype=dtype) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        added = k[:, t, :, :, None].to(dtype) * v[:, t, :, None, :].to(dtype)
        read = state if bonus is None else state + bonus.to(dtype)[:, :, None] * added
        state = state * decay[:, t, :, :, None].to(dtype).exp() + added
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t].to(dtype), state if bonus is None else read))
    return torch.stack(outputs, 1).to(v.dtype), state
