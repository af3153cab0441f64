"""The selective scan, one token at a time (Mamba, Gu and Dao 2023, algorithm 2).

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t

h [D, N]; channel d of x and dt, column n of B and C; A is discretized by zero-order hold, B by
Euler's rule, as in the paper's code.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference", "step"]


def reference(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x, dt [B, T, D], a [D, N], b, c [B, T, N] -> (y [B, T, D], state [B, D, N])."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    state = x.new_zeros(x.shape[0], *a.shape, dtype=dtype) if initial_state is None else initial_state
    outputs = []
    for token in zip(x.unbind(1), dt.unbind(1), b.unbind(1), c.unbind(1), strict=True):
        x_t, dt_t, b_t, c_t = (t.to(dtype) for t in token)
        state, y = step(x_t, dt_t, b_t, c_t, a.to(dtype), state)
        outputs.append(y)
    return torch.stack(outputs, 1).to(x.dtype), state


def step(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(h_t, y_t) from h_{t-1}; x, dt [B, D], b, c [B, N]."""
    state = (dt.unsqueeze(-1) * a).exp() * state + (dt * x).unsqueeze(-1) * b.unsqueeze(1)
    return state, (state @ c.unsqueeze(-1)).squeeze(-1)
