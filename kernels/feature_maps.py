"""Feature maps phi for linear attention, and its normalizer carried as one more column of the state.

Each is plain torch: differentiable, and fused by Inductor with what surrounds it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import elu, layer_norm, pad, relu

from mstc.kernels.api import linear_attention
from mstc.kernels.common.checks import MAX_HEAD_DIM, fail

__all__ = ["elu_plus_one", "hedgehog", "identity", "normalized_attention", "rebased", "relu", "taylor"]


def identity(x: Tensor) -> Tensor:
    """phi(x) = x."""
    return x


def elu_plus_one(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, eq. 7)."""
    return elu(x) + 1


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """phi(x) = [softmax(x W); softmax(-x W)] (Zhang et al. 2024, eq. 6); weight [H, K, F] -> [B, T, H, 2 F]."""
    projected = torch.einsum("bthk,hkf->bthf", x, weight)
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1)


def taylor(x: Tensor) -> Tensor:
    """phi(x) . phi(y) = 1 + s + s^2 / 2 for s = x . y / sqrt(K), the start of exp(s) (Based, Arora et al. 2024).

    The products x_i x_j are kept once for i <= j: 1 + K + K (K + 1) / 2 features instead of 1 + K + K^2,
    with the same inner products, so that K = 16 gives 153 and K = 21 still fits.
    """
    key = x.shape[-1]
    features = 1 + key + key * (key + 1) // 2
    if features > MAX_HEAD_DIM:
        raise fail("x", f"K={key}, {features} features", f"K of at most 21: {MAX_HEAD_DIM} features")
    x = x * key**-0.25
    i, j = torch.triu_indices(key, key, device=x.device)
    weight = torch.where(i == j, 0.5**0.5, 1.0).to(x.dtype)
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., i] * x[..., j] * weight], -1)


def rebased(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """phi(x) = (gamma * norm(x) + beta)^2, norm without gain (ReBased, Aksenov et al. 2024, eq. 9); gamma, beta [K]."""
    return (gamma * layer_norm(x, x.shape[-1:]) + beta).square()


def normalized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """o_t = q_t S_t / (q_t z_t) with z the sum of keys, carried as column V of the state; q, k >= 0 are features.

    Returns (o [B, T, H, V], log of the normalizer [B, T, H], state [B, H, K, V + 1]). The log makes o the
    part of a softmax that ``sliding_window.merge`` joins. A normalizer below ``eps`` is read as ``eps``.
    """
    if v.shape[-1] >= MAX_HEAD_DIM:
        raise fail("v", f"last dimension {v.shape[-1]}", f"1 to {MAX_HEAD_DIM - 1}: the normalizer takes one column")
    both, state = linear_attention(
        q,
        k,
        pad(v, (0, 1), value=1.0),
        decay=decay,
        scale=1.0,
        initial_state=initial_state,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    normalizer = both[..., -1].clamp(min=eps)
    return both[..., :-1] / normalizer.unsqueeze(-1), normalizer.log(), state
