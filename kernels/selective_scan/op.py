"""``mstc::selective_scan``: the op, its fake, autograd, autocast and FLOP formula; and its public function."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mstc.kernels.common.autocast import register_autocast, under_autocast
from mstc.kernels.common.checks import check_offsets_form, check_shape, check_tensors, fail
from mstc.kernels.common.dispatch import takes_triton, triton_form
from mstc.kernels.common.segments import SEGMENT, count_states, state_dtype
from mstc.kernels.selective_scan import blocks, chunked
from mstc.kernels.selective_scan.reference import step

__all__ = ["selective_scan", "selective_scan_backward", "selective_scan_core"]


@torch.library.custom_op("mstc::selective_scan", mutates_args=())
def selective_scan_core(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final states, kept states); ``compiled``: on a CPU, through Inductor."""
    outputs: tuple[Tensor, Tensor, Tensor]
    kernels = triton_form(x, "selective_scan")
    if kernels is not None:
        outputs = kernels.forward(x, dt, a, b, c, initial_state, cu_seqlens)
    else:
        form = blocks if _takes_blocks(x, compiled) else chunked
        outputs = form.run_forward(x, dt, a, b, c, initial_state, cu_seqlens)
    return outputs


def _takes_blocks(x: Tensor, compiled: bool) -> bool:
    return compiled and x.device.type == "cpu"


def _kept_shape(x: Tensor, a: Tensor, documents: int | None, compiled: bool) -> tuple[int, ...]:
    """Of the states that the backward starts from: [slot, B, D, N], or [slot, B, N, D] in blocks."""
    blockwise, segment = _takes_blocks(x, compiled), chunked.SEGMENT_TOKENS
    if takes_triton(x):
        segment = SEGMENT
    elif blockwise:
        segment = blocks.segment_tokens(a.shape[1])
    return (count_states(x.shape[1], documents, segment), x.shape[0], *(a.mT.shape if blockwise else a.shape))


@selective_scan_core.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch = x.shape[0]
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dtype = state_dtype(x.dtype)
    final = x.new_empty((batch if documents is None else documents, *a.shape), dtype=dtype)
    kept = x.new_empty(_kept_shape(x, a, documents, compiled), dtype=dtype)
    return x.new_empty(x.shape), final, kept


@torch.library.custom_op("mstc::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, dt, a, b, c and the initial states."""
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
    kernels = triton_form(x, "selective_scan")
    if kernels is not None:
        found = kernels.backward(grad_out, grad_final, x, dt, a, b, c, kept, cu_seqlens)
    else:
        form = blocks if _takes_blocks(x, compiled) else chunked
        found = form.run_backward(grad_out, grad_final, x, dt, a, b, c, kept, cu_seqlens)
    return found


@selective_scan_backward.register_fake
def _(
    grad_out: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    compiled: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    states = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dx, ddt, da, db, dc = (t.new_empty(t.shape) for t in (x, dt, a, b, c))
    return dx, ddt, da, db, dc, kept.new_empty((states, *a.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, initial_state, cu_seqlens, ctx.compiled = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.save_for_backward(*tensors, cu_seqlens, output[2])


def _backward(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    *tensors, cu_seqlens, kept = ctx.saved_tensors
    grad_out = torch.zeros_like(tensors[0]) if grad_out is None else grad_out
    *grads, initial = selective_scan_backward(grad_out, grad_final, *tensors, kept, cu_seqlens, ctx.compiled)
    state = None if ctx.state_dtype is None else initial.to(ctx.state_dtype)
    return *grads, state, None, None


selective_scan_core.register_autograd(_backward, setup_context=_setup_context)
register_autocast(selective_scan_core, "selective_scan", cast=0)
register_autocast(selective_scan_backward, "selective_scan_backward", cast=0)


@register_flop_formula(torch.ops.mstc.selective_scan)
def _flops(x: torch.Size, dt: torch.Size, a: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Per token and state element: the decay's product, the recurrence and the output (an exponential counts 1)."""
    batch, length, channels = x
    return batch * length * channels * a[-1] * 7


@register_flop_formula(torch.ops.mstc.selective_scan_backward)
def _backward_flops(
    do: torch.Size, df: Any, x: torch.Size, dt: torch.Size, a: torch.Size, *args: Any, **kwargs: Any
) -> int:
    """Per token and state element: the states again, their gradient, W and its four sums."""
    batch, length, channels = x
    return batch * length * channels * a[-1] * 18


@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor: ...
@overload
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: Literal[True],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba's selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t + D x_t, times silu(z_t).

    x, dt [B, T, D], dt > 0 after its softplus; A [D, N], at most 0; B, C [B, T, N]; D [D]; z [B, T, D];
    initial_state [B, D, N], or one for each document packed by ``cu_seqlens`` (then B = 1).
    Returns y [B, T, D], or (y, final state in float32) with ``output_final_state``. Raises
    `KernelArgumentError`, which names the argument, on a wrong type, shape, dtype, device or ``cu_seqlens``.
    """
    _check(x, dt, A, B, C, D, z, initial_state, cu_seqlens)
    if cu_seqlens is None and x.shape[1] == 1:
        one_token = under_autocast(_one_token, x.device.type, cast=0)
        y, final = one_token(x, dt, A, B, C, initial_state)
    else:
        compiled = torch.compiler.is_compiling()
        y, final, _ = selective_scan_core(x, dt, A, B, C, initial_state, cu_seqlens, compiled)
    if D is not None:
        y = y + (D * x).to(y.dtype)
    if z is not None:
        y = y * torch.nn.functional.silu(z)
    return (y, final) if output_final_state else y


def _one_token(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = state_dtype(x.dtype)
    before = x.new_zeros(x.shape[0], *a.shape, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    x0, dt0, b0, c0 = (t[:, 0].to(dtype) for t in (x, dt, b, c))
    state, y = step(x0, dt0, b0, c0, a.to(dtype), before)
    return y.unsqueeze(1).to(x.dtype), state


def _check(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    optional = {"D": skip, "z": z, "initial_state": initial_state}
    named = {"x": x, "dt": dt, "A": a, "B": b, "C": c}
    check_tensors(named, {**optional, "cu_seqlens": cu_seqlens})
    if x.dim() != 3 or x.shape[1] < 1:
        raise fail("x", f"shape {list(x.shape)}", "[B, T, D] with at least one token")
    if a.dim() != 2:
        raise fail("A", f"shape {list(a.shape)}", "[D, N]")
    batch, length, channels = x.shape
    columns = a.shape[1]
    states = batch
    if cu_seqlens is not None:
        check_offsets_form(cu_seqlens, batch)
        states = cu_seqlens.shape[0] - 1
    wanted = {
        "dt": (batch, length, channels),
        "A": (channels, columns),
        "B": (batch, length, columns),
        "C": (batch, length, columns),
        "D": (channels,),
        "z": (batch, length, channels),
        "initial_state": (states, channels, columns),
    }
    letters = {"dt": "BTD", "A": "DN", "B": "BTN", "C": "BTN", "D": "D", "z": "BTD", "initial_state": "BDN"}
    for name, shape in wanted.items():
        tensor = {**named, **optional}[name]
        if tensor is not None:
            check_shape(name, tensor, list(zip(letters[name], shape, strict=True)))
