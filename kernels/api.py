"""``linear_attention``: checks of the arguments, and the class of its decay."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mstc.kernels.common.checks import (
    check_device,
    check_dtype,
    check_head_dim,
    check_offsets_form,
    check_shape,
    fail,
)
from mstc.kernels.scalar_decay.op import scalar_decay
from mstc.kernels.scalar_decay.recurrent import fused_recurrent

__all__ = ["linear_attention"]


@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention: S_t = exp(decay_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t.

    q, k: [B, T, H, K]; v: [B, T, H, V]; decay: log decay, at most 0, as [H] or [B, T, H]
    (None: no decay); scale: K ** -0.5 unless given; initial_state: [B, H, K, V], or [N, H, K, V]
    for N documents packed by ``cu_seqlens`` [N + 1] (then B = 1).
    Returns o [B, T, H, V], or (o, final state) with ``output_final_state``.
    """
    _check(q, k, v, decay, beta, initial_state, cu_seqlens)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(q.shape[:3])
    if q.shape[1] == 1 and cu_seqlens is None:
        out, final = fused_recurrent(q, k, v, decay, initial_state, scale)
    else:
        compiled = torch.compiler.is_compiling()
        out, final, _ = scalar_decay(q, k, v, decay, initial_state, cu_seqlens, scale, compiled)
    return (out, final) if output_final_state else out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    named = {"q": q, "k": k, "v": v, "decay": decay, "beta": beta, "initial_state": initial_state}
    check_device("q", {**named, "cu_seqlens": cu_seqlens})
    for name, tensor in named.items():
        if tensor is not None:
            check_dtype(name, tensor)
    _check_inputs(q, k, v)
    batch, length, heads, key = q.shape
    if beta is not None:
        raise fail("beta", "a tensor", "None: the delta rule is not built yet")
    if decay is not None:
        _check_decay(decay, batch, length, heads)
    states = batch
    if cu_seqlens is not None:
        check_offsets_form(cu_seqlens, batch)
        states = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_shape("initial_state", initial_state, [("N", states), ("H", heads), ("K", key), ("V", v.shape[-1])])


def _check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4:
        raise fail("q", f"shape {list(q.shape)}", "[B, T, H, K]")
    batch, length, heads, key = q.shape
    if length < 1:
        raise fail("q", f"T={length}", "at least one token")
    check_head_dim("q", key)
    check_shape("k", k, [("B", batch), ("T", length), ("H", heads), ("K", key)])
    if v.dim() != 4:
        raise fail("v", f"shape {list(v.shape)}", "[B, T, H, V]")
    check_head_dim("v", v.shape[-1])
    check_shape("v", v, [("B", batch), ("T", length), ("H", heads), ("V", v.shape[-1])])
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
            raise fail(name, f"dtype {tensor.dtype}", f"the dtype of q, {q.dtype}, or autocast")


def _check_decay(decay: Tensor, batch: int, length: int, heads: int) -> None:
    if decay.dim() == 1:
        check_shape("decay", decay, [("H", heads)])
    elif decay.dim() == 3:
        check_shape("decay", decay, [("B", batch), ("T", length), ("H", heads)])
    else:
        raise fail("decay", f"shape {list(decay.shape)}", "[H] or [B, T, H]; a decay over K is not built yet")
