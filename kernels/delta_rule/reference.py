"""The delta rule with a decay, one token at a time.

    S <- exp(g_t) S_{t-1}        S_t = S + k_t^T beta_t (v_t - k_t S)        o_t = scale * q_t S_t

Decay first, then the correction of what k_t reads. g = 0 is DeltaNet (Yang et al. 2024, eq. 4), a
scalar g Gated DeltaNet (Yang et al. 2025, eq. 10), g over K Kimi Delta Attention (2025, eq. 1).
The state stays bounded for beta in [0, 2] and k of norm 1, which is the caller's to see to.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], decay [B, T, H] or [B, T, H, K], beta [B, T, H] -> (o, state)."""
    batch, length, heads, key = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = q.new_zeros(batch, heads, key, v.shape[-1], dtype=dtype) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        state, out = step(q, k, v, decay, beta, state, t, dtype)
        outputs.append(scale * out)
    return torch.stack(outputs, 1).to(v.dtype), state


def step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor, state: Tensor, t: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(S_t, q_t S_t) from S_{t-1}."""
    if decay is not None:
        gate = decay[:, t].to(dtype).exp()
        state = state * (gate[..., None] if gate.dim() == 3 else gate[..., None, None])
    key, value = k[:, t, :, :, None].to(dtype), v[:, t].to(dtype)
    error = beta[:, t, :, None].to(dtype) * (value - (key * state).sum(-2))
    state = state + key * error.unsqueeze(-2)
    return state, (q[:, t, :, :, None].to(dtype) * state).sum(-2)
