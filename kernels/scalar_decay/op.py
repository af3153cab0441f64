"""``mstc::scalar_decay``: the op, its fake, autograd, autocast and FLOP formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mstc.kernels.common.autocast import register_autocast
from mstc.kernels.common.dispatch import triton_form
from mstc.kernels.common.segments import CHUNK, count_states, run_backward, run_forward, state_dtype
from mstc.kernels.scalar_decay.chunked import BODY

__all__ = ["scalar_decay", "scalar_decay_backward"]


@torch.library.custom_op("mstc::scalar_decay", mutates_args=())
def scalar_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final states, kept states); ``compiled``: the CPU form's bodies go through Inductor."""
    kernels = triton_form(q, "scalar_decay")
    if kernels is not None:
        outputs: tuple[Tensor, Tensor, Tensor] = kernels.forward(q, k, v, decay, initial_state, cu_seqlens, scale)
        return outputs
    out = v.new_empty(v.shape)
    shape = (q.shape[-1], v.shape[-1])
    final, kept = run_forward(BODY, (q, k, v, decay), (), out, shape, initial_state, cu_seqlens, scale, compiled)
    return out, final, kept


@scalar_decay.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, key = q.shape
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (heads, key, v.shape[-1])
    dtype = state_dtype(q.dtype)
    final = q.new_empty((batch if documents is None else documents, *state), dtype=dtype)
    kept = q.new_empty((count_states(length, documents), batch, *state), dtype=dtype)
    return v.new_empty(v.shape), final, kept


@torch.library.custom_op("mstc::scalar_decay_backward", mutates_args=())
def scalar_decay_backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, decay (empty without one) and the initial states."""
    kernels = triton_form(q, "scalar_decay")
    if kernels is not None:
        found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = kernels.backward(
            grad_out, grad_final, q, k, v, decay, kept, cu_seqlens, scale
        )
        return found
    grads, _, initial = run_backward(
        BODY, (q, k, v, decay), (), kept, grad_out, grad_final, cu_seqlens, scale, compiled
    )
    dq, dk, dv, dg = grads
    return dq, dk, dv, q.new_empty(0) if dg is None else dg, initial


@scalar_decay_backward.register_fake
def _(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dg = q.new_empty(0) if decay is None else decay.new_empty(decay.shape)
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    return *grads, dg, kept.new_empty((states, *kept.shape[2:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, decay, initial_state, cu_seqlens, ctx.scale, ctx.compiled = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(q, k, v, decay, cu_seqlens, output[2])


def _backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, decay, cu_seqlens, kept = ctx.saved_tensors
    grad_out = torch.zeros_like(v) if grad_out is None else grad_out
    dq, dk, dv, dg, initial = scalar_decay_backward(
        grad_out, grad_final, q, k, v, decay, kept, cu_seqlens, ctx.scale, ctx.compiled
    )
    state = None if ctx.state_dtype is None else initial.to(ctx.state_dtype)
    return dq, dk, dv, None if decay is None else dg, state, None, None, None


scalar_decay.register_autograd(_backward, setup_context=_setup_context)

register_autocast(scalar_decay, "scalar_decay", cast=3)


@register_flop_formula(torch.ops.mstc.scalar_decay)
def _flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Per token and head: q k^T and A v over a chunk, the state's update and its reading."""
    batch, length, heads, key = q
    return batch * length * heads * (2 * CHUNK * (key + v[-1]) + 4 * key * v[-1])


@register_flop_formula(torch.ops.mstc.scalar_decay_backward)
def _backward_flops(do: torch.Size, df: Any, q: torch.Size, k: torch.Size, v: torch.Size, *a: Any, **kw: Any) -> int:
    """Per token and head: five products over a chunk, the states again, their gradient, and dq, dk, dv from them."""
    batch, length, heads, key = q
    return batch * length * heads * (2 * CHUNK * (3 * key + 2 * v[-1]) + 10 * key * v[-1])
