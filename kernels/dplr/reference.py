"""Linear attention whose transition is diagonal plus rank one, one token at a time.

    S_t = diag(exp(g_t)) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t        o_t = scale * q_t S_t

RWKV7 (Peng et al. 2025, eq. 17) takes a = -kappa and b = kappa * eta, kappa a normalized key and eta
an in-context learning rate; a reads the state *before* the decay.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference", "step"]


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """q, k, a, b, decay [B, T, H, K], v [B, T, H, V] -> (o [B, T, H, V], state [B, H, K, V])."""
    batch, length, heads, key = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = q.new_zeros(batch, heads, key, v.shape[-1], dtype=dtype) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        state, out = step(q, k, v, a, b, decay, state, t, dtype)
        outputs.append(scale * out)
    return torch.stack(outputs, 1).to(v.dtype), state


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    state: Tensor,
    t: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(S_t, q_t S_t) from S_{t-1}."""
    q_t, k_t, a_t, b_t = (x[:, t, :, :, None].to(dtype) for x in (q, k, a, b))
    read = (a_t * state).sum(-2, keepdim=True)
    added = k_t * v[:, t, :, None, :].to(dtype) + b_t * read
    state = state * decay[:, t, :, :, None].to(dtype).exp() + added
    return state, (q_t * state).sum(-2)
