"""``mstc::delta_rule``: the op, its fake, autograd, autocast and FLOP formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mstc.kernels.common.autocast import register_autocast
from mstc.kernels.common.dispatch import triton_form
from mstc.kernels.common.outputs import empty_gradients, empty_outputs, or_empty
from mstc.kernels.common.segments import CHUNK, run_backward, run_forward
from mstc.kernels.delta_rule.chunked import BODY

__all__ = ["delta_rule", "delta_rule_backward"]

Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("mstc::delta_rule", mutates_args=())
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final states, kept states); ``compiled``: the CPU form's bodies go through Inductor."""
    kernels = triton_form(q, "delta_rule")
    if kernels is not None:
        outputs: tuple[Tensor, Tensor, Tensor] = kernels.forward(q, k, v, decay, beta, initial_state, cu_seqlens, scale)
        return outputs
    out = v.new_empty(v.shape)
    shape = (q.shape[-1], v.shape[-1])
    tokens = (q, k, v, decay, beta)
    final, kept = run_forward(BODY, tokens, (), out, shape, initial_state, cu_seqlens, scale, compiled)
    return out, final, kept


@delta_rule.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_outputs(q, v, cu_seqlens)


@torch.library.custom_op("mstc::delta_rule_backward", mutates_args=())
def delta_rule_backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, decay, beta (empty where the input is None) and the initial states."""
    kernels = triton_form(q, "delta_rule")
    if kernels is not None:
        found: Grads = kernels.backward(grad_out, grad_final, q, k, v, decay, beta, kept, cu_seqlens, scale)
        return found
    tokens = (q, k, v, decay, beta)
    grads, _, initial = run_backward(BODY, tokens, (), kept, grad_out, grad_final, cu_seqlens, scale, compiled)
    dq, dk, dv, ddecay, dbeta = grads
    return dq, dk, dv, or_empty(ddecay, q), dbeta, initial


@delta_rule_backward.register_fake
def _(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    found: Any = empty_gradients((q, k, v, decay, beta), kept, cu_seqlens)
    return found  # type: ignore[no-any-return]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial_state, cu_seqlens, ctx.scale, ctx.compiled = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])


def _backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    q, k, v, decay, beta, cu_seqlens, kept = ctx.saved_tensors
    grad_out = torch.zeros_like(v) if grad_out is None else grad_out
    dq, dk, dv, ddecay, dbeta, initial = delta_rule_backward(
        grad_out, grad_final, q, k, v, decay, beta, kept, cu_seqlens, ctx.scale, ctx.compiled
    )
    state = None if ctx.state_dtype is None else initial.to(ctx.state_dtype)
    return dq, dk, dv, None if decay is None else ddecay, dbeta, state, None, None, None


delta_rule.register_autograd(_backward, setup_context=_setup_context)
register_autocast(delta_rule, "delta_rule", cast=3)


@register_flop_formula(torch.ops.mstc.delta_rule)
def _flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Per token and head: two pairs, the inverse, W, Y, A u; the transition, its scan; the reads of the state."""
    batch, length, heads, key = q
    value = v[-1]
    return (
        batch * length * heads * (CHUNK * (6 * key + 4 * value) + CHUNK * CHUNK // 3 + 4 * key * key + 8 * key * value)
    )


@register_flop_formula(torch.ops.mstc.delta_rule_backward)
def _backward_flops(do: torch.Size, df: Any, q: torch.Size, k: torch.Size, v: torch.Size, *a: Any, **kw: Any) -> int:
    """Per token and head: the forward again without the output, then each product's two gradients."""
    batch, length, heads, key = q
    value = v[-1]
    return (
        batch
        * length
        * heads
        * (CHUNK * (14 * key + 10 * value) + CHUNK * CHUNK // 3 + 6 * key * key + 22 * key * value)
    )
