"""Linear attention with a scalar decay per head and token, one token at a time.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

S [K, V]; g_t = 0 is linear attention (Katharopoulos et al. 2020, eq. 18-20), g constant per head
is RetNet (Sun et al. 2023, eq. 6) and Lightning Attention (Qin et al. 2024), g from the input is
Mamba2's SSD (Dao and Gu 2024, section 6) and simple GLA. Any length; float64 in, float64 throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference"]


def reference(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """q, k [B, T, H, K], v [B, T, H, V], decay [B, T, H] -> (o [B, T, H, V], state [B, H, K, V])."""
    batch, length, heads, key = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    state = q.new_zeros(batch, heads, key, v.shape[-1], dtype=dtype) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        if decay is not None:
            state = state * decay[:, t, :, None, None].to(dtype).exp()
        state = state + k[:, t, :, :, None].to(dtype) * v[:, t, :, None, :].to(dtype)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t].to(dtype), state))
    return torch.stack(outputs, 1).to(v.dtype), state
