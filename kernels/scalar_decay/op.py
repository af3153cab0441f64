"""``mstc::scalar_decay``: the op, its fake, autograd, autocast and FLOP formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mstc.kernels.common.autocast import register_autocast
from mstc.kernels.common.dispatch import triton_form
from mstc.kernels.common.outputs import empty_gradients, empty_outputs, or_empty
from mstc.kernels.common.segments import CHUNK, run_backward, run_forward
from mstc.kernels.scalar_decay.chunked import BODY

__all__ = ["scalar_decay", "scalar_decay_backward"]

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


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
    tokens = (q, k, v, decay)
    final, kept = run_forward(BODY, tokens, (), out, shape, initial_state, cu_seqlens, scale, compiled)
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
    return empty_outputs(q, v, cu_seqlens)


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
    """The gradients of q, k, v, decay (empty where the input is None) and the initial states."""
    kernels = triton_form(q, "scalar_decay")
    if kernels is not None:
        found: Grads = kernels.backward(grad_out, grad_final, q, k, v, decay, kept, cu_seqlens, scale)
        return found
    tokens = (q, k, v, decay)
    grads, _, initial = run_backward(BODY, tokens, (), kept, grad_out, grad_final, cu_seqlens, scale, compiled)
    dq, dk, dv, ddecay = grads
    return dq, dk, dv, or_empty(ddecay, q), initial


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
    found: Any = empty_gradients((q, k, v, decay), kept, cu_seqlens)
    return found  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial_state, cu_seqlens, ctx.scale, ctx.compiled = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])


def _backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, decay, cu_seqlens, kept = ctx.saved_tensors
    grad_out = torch.zeros_like(v) if grad_out is None else grad_out
    dq, dk, dv, ddecay, initial = scalar_decay_backward(
        grad_out, grad_final, q, k, v, decay, kept, cu_seqlens, ctx.scale, ctx.compiled
    )
    state = None if ctx.state_dtype is None else initial.to(ctx.state_dtype)
    return dq, dk, dv, None if decay is None else ddecay, state, None, None, None


scalar_decay.register_autograd(_backward, setup_context=_setup_context)
register_autocast(scalar_decay, "scalar_decay", cast=3)


@register_flop_formula(torch.ops.mstc.scalar_decay)
def _flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Per token and head: q k^T and A v over a chunk, the state's update and its reading."""
    batch, length, heads, key = q
    value = v[-1]
    return batch * length * heads * (2 * CHUNK * (key + value) + 4 * key * value)


@register_flop_formula(torch.ops.mstc.scalar_decay_backward)
def _backward_flops(do: torch.Size, df: Any, q: torch.Size, k: torch.Size, v: torch.Size, *a: Any, **kw: Any) -> int:
    """Per token and head: five products over a chunk, the states again, their gradient, and dq, dk, dv from them."""
    batch, length, heads, key = q
    value = v[-1]
    return batch * length * heads * (2 * CHUNK * (3 * key + 2 * value) + 10 * key * value)
