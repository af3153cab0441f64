"""Fused attention kernels that PyTorch has no public function for.

``aten::_scaled_dot_product_flash_attention_for_cpu`` is what ``scaled_dot_product_attention`` runs on a CPU; it alone
returns the log-sum-exp that its backward needs. ``aten::_flash_attention_forward`` is FlashAttention-2 on a GPU, the
only one of PyTorch's kernels with a window; ``torch.nn.attention.varlen`` calls it for packed documents in the same
way. Schemas checked with 2.11 and 2.13.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["cpu_attention", "cpu_attention_backward", "flash_window", "flash_window_backward", "has_flash_window"]

aten = torch.ops.aten


def cpu_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp [B, H, S]) of q [B, H, S, D] and k, v [B, H or a divisor, T, D]; an added mask [S, T] or
    [B or 1, 1, S, T]."""
    out: Any = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    return out[0], out[1]


def cpu_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    kernel = aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = kernel(grad, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    return dq, dk, dv


def has_flash_window(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether FlashAttention-2 takes them: half precision, heads of up to 256 in steps of 8, sm_80 or later."""
    width = q.shape[-1]
    if q.device.type != "cuda" or q.dtype.itemsize != 2 or torch.version.hip is not None:
        return False
    if not width == k.shape[-1] == v.shape[-1] or width % 8 or width > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def flash_window(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float | None) -> tuple[Tensor, Tensor]:
    """As `cpu_attention`, of the keys from ``left`` before each query to ``right`` behind it."""
    length = q.shape[2]
    operands = [x.transpose(1, 2) for x in (q, k, v)]
    out: Any = aten._flash_attention_forward(
        *operands, None, None, length, length, 0.0, right == 0, False, scale=scale,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return out[0].transpose(1, 2), out[1]


def flash_window_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, left: int, right: int, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    length = q.shape[2]
    operands = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of the random numbers: there is no dropout
    grads: Any = aten._flash_attention_backward(
        *operands, lse, None, None, length, length, 0.0, right == 0, state, state, scale=scale,
        window_size_left=left, window_size_right=right,
    )  # fmt: skip
    dq, dk, dv = (g.transpose(1, 2) for g in grads)
    return dq, dk, dv
