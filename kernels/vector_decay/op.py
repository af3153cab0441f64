"""``mstc::vector_decay``: the op, its fake, autograd, autocast and FLOP formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mstc.kernels.common.autocast import register_autocast
from mstc.kernels.common.dispatch import triton_form
from mstc.kernels.common.outputs import empty_gradients, empty_outputs, or_empty
from mstc.kernels.common.segments import CHUNK, run_backward, run_forward
from mstc.kernels.vector_decay.chunked import BODY

__all__ = ["vector_decay", "vector_decay_backward"]

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("mstc::vector_decay", mutates_args=())
def vector_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final states, kept states); ``compiled``: the CPU form's bodies go through Inductor."""
    kernels = triton_form(q, "vector_decay")
    if kernels is not None:
        outputs: tuple[Tensor, Tensor, Tensor] = kernels.forward(
            q, k, v, decay, bonus, initial_state, cu_seqlens, scale
        )
        return outputs
    out = v.new_empty(v.shape)
    shape = (q.shape[-1], v.shape[-1])
    tokens = (q, k, v, decay)
    final, kept = run_forward(BODY, tokens, (bonus,), out, shape, initial_state, cu_seqlens, scale, compiled)
    return out, final, kept


@vector_decay.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(q, v, cu_seqlens)


@torch.library.custom_op("mstc::vector_decay_backward", mutates_args=())
def vector_decay_backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, decay, bonus (empty where the input is None) and the initial states."""
    kernels = triton_form(q, "vector_decay")
    if kernels is not None:
        found: Grads = kernels.backward(grad_out, grad_final, q, k, v, decay, bonus, kept, cu_seqlens, scale)
        return found
    tokens = (q, k, v, decay)
    grads, sums, initial = run_backward(BODY, tokens, (bonus,), kept, grad_out, grad_final, cu_seqlens, scale, compiled)
    dq, dk, dv, ddecay = grads
    (dbonus,) = sums
    return dq, dk, dv, ddecay, or_empty(dbonus, q), initial


@vector_decay_backward.register_fake
def _(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found: Any = empty_gradients((q, k, v, decay, bonus), kept, cu_seqlens)
    return found  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial_state, cu_seqlens, ctx.scale, ctx.compiled = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])


def _backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, decay, bonus, cu_seqlens, kept = ctx.saved_tensors
    grad_out = torch.zeros_like(v) if grad_out is None else grad_out
    dq, dk, dv, ddecay, dbonus, initial = vector_decay_backward(
        grad_out, grad_final, q, k, v, decay, bonus, kept, cu_seqlens, ctx.scale, ctx.compiled
    )
    state = None if ctx.state_dtype is None else initial.to(ctx.state_dtype)
    return dq, dk, dv, ddecay, None if bonus is None else dbonus, state, None, None, None


vector_decay.register_autograd(_backward, setup_context=_setup_context)
register_autocast(vector_decay, "vector_decay", cast=3)


@register_flop_formula(torch.ops.mstc.vector_decay)
def _flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Per token and head: the pairs (a triangle), A v, the state's update and its reading."""
    batch, length, heads, key = q
    value = v[-1]
    return batch * length * heads * (CHUNK * key + 2 * CHUNK * value + 4 * key * value)


@register_flop_formula(torch.ops.mstc.vector_decay_backward)
def _backward_flops(do: torch.Size, df: Any, q: torch.Size, k: torch.Size, v: torch.Size, *a: Any, **kw: Any) -> int:
    """Per token and head: pairs and gradients (triangles), dA, dv, the states, their gradient and dq, dk, dv."""
    batch, length, heads, key = q
    value = v[-1]
    return batch * length * heads * (3 * CHUNK * key + 4 * CHUNK * value + 10 * key * value)
