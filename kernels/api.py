"""``linear_attention`` and ``dplr_attention``: checks of the arguments, and the class that they ask for."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mstc.kernels.common.autocast import under_autocast
from mstc.kernels.common.checks import (
    check_attention_inputs,
    check_offsets_form,
    check_same_dtype,
    check_shape,
    check_tensors,
    fail,
    scale_of,
)
from mstc.kernels.delta_rule.op import delta_rule
from mstc.kernels.delta_rule.recurrent import fused_recurrent as delta_recurrent
from mstc.kernels.dplr.op import dplr
from mstc.kernels.dplr.recurrent import fused_recurrent as dplr_recurrent
from mstc.kernels.scalar_decay.op import scalar_decay
from mstc.kernels.scalar_decay.recurrent import fused_recurrent as scalar_recurrent
from mstc.kernels.vector_decay.op import vector_decay
from mstc.kernels.vector_decay.recurrent import fused_recurrent as vector_recurrent

__all__ = ["dplr_attention", "linear_attention"]


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
    bonus: Tensor | None = None,
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
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
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
    bonus: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention: S_t = exp(decay_t) S_{t-1} + k_t^T v_t, o_t = scale * q_t S_t.

    q, k: [B, T, H, K]; v: [B, T, H, V]; decay: log decay, at most 0, as [H], [B, T, H] or
    [B, T, H, K] (None: no decay); scale: K ** -0.5 unless given; initial_state: [B, H, K, V], or
    [N, H, K, V] for N documents packed by ``cu_seqlens`` [N + 1] (then B = 1). beta [B, T, H] is
    the delta rule: decay first, then S += k (beta (v - k S)). bonus [H, K] (RWKV6, with a decay
    over K): o_t = scale * q_t (S_{t-1} + diag(bonus) k_t^T v_t).
    K and V are at most 256; q, k and v have one dtype of bfloat16, float16, float32 and float64.
    Returns o [B, T, H, V] in that dtype, or with ``output_final_state`` (o, final state), the state as
    initial_state is shaped, in float32 (float64 for float64). Raises `KernelArgumentError`, which names
    the argument, on a wrong type, shape, dtype, device or ``cu_seqlens``.
    """
    optional = {"decay": decay, "beta": beta, "bonus": bonus}
    _check_common({"q": q, "k": k, "v": v}, optional, initial_state, cu_seqlens)
    _check_options(q, decay, beta, bonus)
    scale = scale_of(scale, q.shape[-1])
    if decay is not None and decay.dim() == 1:
        decay = decay.expand(q.shape[:3])
    out, final = _run(q, k, v, decay, beta, bonus, scale, initial_state, cu_seqlens)
    return (out, final) if output_final_state else out


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    bonus: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    one = _is_one_token(q, cu_seqlens)
    compiled = torch.compiler.is_compiling()
    if beta is not None:
        if one:
            return under_autocast(delta_recurrent, q.device.type, 3)(q, k, v, decay, beta, initial_state, scale)
        out, final, _ = delta_rule(q, k, v, decay, beta, initial_state, cu_seqlens, scale, compiled)
        return out, final
    if decay is not None and decay.dim() == 4:
        if one:
            return under_autocast(vector_recurrent, q.device.type, 3)(q, k, v, decay, bonus, initial_state, scale)
        out, final, _ = vector_decay(q, k, v, decay, bonus, initial_state, cu_seqlens, scale, compiled)
        return out, final
    if one:
        return under_autocast(scalar_recurrent, q.device.type, 3)(q, k, v, decay, initial_state, scale)
    out, final, _ = scalar_decay(q, k, v, decay, initial_state, cu_seqlens, scale, compiled)
    return out, final


@overload
def dplr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    decay: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor: ...
@overload
def dplr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    decay: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def dplr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    decay: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """S_t = diag(exp(decay_t)) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t, o_t = scale * q_t S_t (RWKV7).

    q, k, a, b and decay are [B, T, H, K]; everything else, errors among it, is as in ``linear_attention``.
    """
    _check_common({"q": q, "k": k, "v": v, "a": a, "b": b, "decay": decay}, {}, initial_state, cu_seqlens)
    dims = list(zip("BTHK", q.shape, strict=True))
    for name, tensor in (("a", a), ("b", b), ("decay", decay)):
        check_shape(name, tensor, dims)
    for name, tensor in (("a", a), ("b", b)):
        check_same_dtype(name, tensor, q)
    scale = scale_of(scale, q.shape[-1])
    if _is_one_token(q, cu_seqlens):
        out, final = under_autocast(dplr_recurrent, q.device.type, 5)(q, k, v, a, b, decay, initial_state, scale)
    else:
        compiled = torch.compiler.is_compiling()
        out, final, _ = dplr(q, k, v, a, b, decay, initial_state, cu_seqlens, scale, compiled)
    return (out, final) if output_final_state else out


def _is_one_token(q: Tensor, cu_seqlens: Tensor | None) -> bool:
    return cu_seqlens is None and q.shape[1] == 1


def _check_common(
    required: dict[str, Tensor],
    optional: dict[str, Tensor | None],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    check_tensors(required, {**optional, "initial_state": initial_state, "cu_seqlens": cu_seqlens})
    q, k, v, *_ = required.values()
    check_attention_inputs(q, k, v)
    batch, _, heads, key = q.shape
    states = batch
    if cu_seqlens is not None:
        check_offsets_form(cu_seqlens, batch)
        states = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check_shape("initial_state", initial_state, [("N", states), ("H", heads), ("K", key), ("V", v.shape[-1])])


def _check_options(q: Tensor, decay: Tensor | None, beta: Tensor | None, bonus: Tensor | None) -> None:
    batch, length, heads, key = q.shape
    tokens = [("B", batch), ("T", length), ("H", heads)]
    if decay is not None:
        allowed = {1: [("H", heads)], 3: tokens, 4: [*tokens, ("K", key)]}
        if decay.dim() not in allowed:
            raise fail("decay", f"shape {list(decay.shape)}", "[H], [B, T, H] or [B, T, H, K]")
        check_shape("decay", decay, allowed[decay.dim()])
    if beta is not None:
        check_shape("beta", beta, tokens)
    if bonus is not None:
        check_shape("bonus", bonus, [("H", heads), ("K", key)])
        if beta is not None or decay is None or decay.dim() != 4:
            raise fail("bonus", "a tensor", "only with a decay of [B, T, H, K] and without beta")
