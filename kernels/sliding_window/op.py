"""``mstc::sliding_window``: the op, its fake, autograd, autocast and FLOP formula; and its public function."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mstc.kernels.common.autocast import register_autocast
from mstc.kernels.common.checks import check_attention_inputs, check_offsets_form, check_tensors, fail, scale_of
from mstc.kernels.common.dispatch import triton_form
from mstc.kernels.common.segments import state_dtype
from mstc.kernels.sliding_window import chunked

__all__ = ["sliding_window", "sliding_window_attention", "sliding_window_backward"]


@torch.library.custom_op("mstc::sliding_window", mutates_args=())
def sliding_window(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(o, log-sum-exp)."""
    kernels = triton_form(q, "sliding_window")
    if kernels is not None:
        outputs: tuple[Tensor, Tensor] = kernels.forward(q, k, v, cu_seqlens, window, sinks, scale)
        return outputs
    return chunked.run_forward(q, k, v, cu_seqlens, window, sinks, scale)


@sliding_window.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))


@torch.library.custom_op("mstc::sliding_window_backward", mutates_args=())
def sliding_window_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    kernels = triton_form(q, "sliding_window")
    form = chunked.run_backward if kernels is None else kernels.backward
    grads: tuple[Tensor, Tensor, Tensor] = form(grad_out, grad_lse, q, k, v, out, lse, cu_seqlens, window, sinks, scale)
    return grads


@sliding_window_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    grad_out = torch.zeros_like(v) if grad_out is None else grad_out
    grads = sliding_window_backward(grad_out, grad_lse, q, k, v, out, lse, cu_seqlens, *ctx.settings)
    return *grads, None, None, None, None


sliding_window.register_autograd(_backward, setup_context=_setup_context)
register_autocast(sliding_window, "sliding_window", cast=3)
register_autocast(sliding_window_backward, "sliding_window_backward", cast=0)


def _seen(tokens: int, window: int, sinks: int) -> int:
    """Keys that all queries of a sequence see together."""
    inside = min(tokens, window)
    outside = tokens - inside
    in_window = inside * (inside + 1) // 2 + outside * window
    early = min(sinks, outside)
    return in_window + early * (early + 1) // 2 + (outside - early) * early


@register_flop_formula(torch.ops.mstc.sliding_window)
def _flops(
    q: torch.Size, k: torch.Size, v: torch.Size, cu: Any, window: int, sinks: int, *args: Any, **kwargs: Any
) -> int:
    """Scores and their product with v, for each key that is seen (one document)."""
    batch, tokens, heads, key = q
    return 2 * batch * heads * _seen(tokens, window, sinks) * (key + v[-1])


@register_flop_formula(torch.ops.mstc.sliding_window_backward)
def _backward_flops(do: Any, dl: Any, q: torch.Size, k: Any, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Scores again, dP, dq, dk, dv, for each key that is seen."""
    batch, tokens, heads, key = q
    _, _, _, window, sinks = args[:5]
    return 2 * batch * heads * _seen(tokens, window, sinks) * (3 * key + 2 * v[-1])


@overload
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor: ...
@overload
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    return_lse: Literal[True],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal softmax attention to the last ``window`` keys (the query's own among them) and the first ``sinks``.

    q, k [B, T, H, K]; v [B, T, H, V]; scale: K ** -0.5 unless given. Returns o [B, T, H, V], or
    (o, log-sum-exp of the scores [B, T, H]) with ``return_lse``, which ``merge`` joins with other keys.
    dtypes, documents packed by ``cu_seqlens`` and errors are as in ``linear_attention``.
    """
    check_tensors({"q": q, "k": k, "v": v}, {"cu_seqlens": cu_seqlens})
    check_attention_inputs(q, k, v)
    for name, number, least in (("window", window, 1), ("sinks", sinks, 0)):
        if not isinstance(number, int | torch.SymInt) or number < least:
            raise fail(name, number, f"an int, {least} or more")
    if cu_seqlens is not None:
        check_offsets_form(cu_seqlens, q.shape[0])
    scale = scale_of(scale, q.shape[-1])
    out, lse = sliding_window(q, k, v, cu_seqlens, window, sinks, scale)
    return (out, lse) if return_lse else out
