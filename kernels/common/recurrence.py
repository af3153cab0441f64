"""The op of one class of recurrences: forward, backward, fakes, autograd, autocast and FLOP formulas.

    mstc::NAME(operands..., initial_state, cu_seqlens, scale, compiled) -> (o, final states, kept states)
    mstc::NAME_backward(grad_out, grad_final, operands..., kept, cu_seqlens, scale, compiled)
        -> (gradients of the operands (empty where one is None)..., gradient of the initial states)

``compiled``: the CPU form's bodies go through Inductor. Kept states are those that the backward starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mstc.kernels.common.autocast import register_autocast
from mstc.kernels.common.dispatch import triton_form
from mstc.kernels.common.outputs import empty_gradients, empty_outputs, or_empty
from mstc.kernels.common.segments import Body, run_backward, run_forward

__all__ = ["Recurrence"]


@dataclass(frozen=True)
class Recurrence:
    """What tells one class from another.

    tokens, shared: names of the operands with and without a token axis, q, k, v first; one that ends in "?" may be
    None; cast: how many operands feed matrix products and are cast under autocast; body: the CPU form;
    flops: of forward and backward per token and head, for widths K and V.
    """

    name: str
    tokens: tuple[str, ...]
    shared: tuple[str, ...]
    cast: int
    body: Body
    flops: Callable[[int, int], tuple[int, int]]

    def define(self) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
        """Register both ops; the forward one, which has a gradient."""
        names = (*self.tokens, *self.shared)
        operands = ", ".join(f"Tensor{'?' * n.endswith('?')} {n.rstrip('?')}" for n in names)
        rest = "Tensor? cu_seqlens, float scale, bool compiled"
        three = ", ".join(["Tensor"] * 3)
        gradients = ", ".join(["Tensor"] * (len(names) + 1))
        define: Any = torch.library.custom_op
        forward = define(
            f"mstc::{self.name}",
            self._forward,
            mutates_args=(),
            schema=f"({operands}, Tensor? initial_state, {rest}) -> ({three})",
        )
        backward = define(
            f"mstc::{self.name}_backward",
            self._backward,
            mutates_args=(),
            schema=f"(Tensor grad_out, Tensor? grad_final, {operands}, Tensor kept, {rest}) -> ({gradients})",
        )
        forward.register_fake(self._forward_fake)
        backward.register_fake(self._backward_fake)
        forward.register_autograd(self._vjp(backward), setup_context=self._save)
        register_autocast(forward, self.name, cast=self.cast)
        register_autocast(backward, f"{self.name}_backward", cast=0)
        register_flop_formula(getattr(torch.ops.mstc, self.name))(self._forward_flops)
        register_flop_formula(getattr(torch.ops.mstc, f"{self.name}_backward"))(self._backward_flops)
        return forward  # type: ignore[no-any-return]

    def _forward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *operands, initial_state, cu_seqlens, scale, compiled = args
        q, _, v, *_ = operands
        kernels = triton_form(q, self.name)
        if kernels is not None:
            outputs: tuple[Tensor, Tensor, Tensor] = kernels.forward(*operands, initial_state, cu_seqlens, scale)
            return outputs
        out = v.new_empty(v.shape)
        tokens, shared = self._parted(operands)
        shape = (q.shape[-1], v.shape[-1])
        final, kept = run_forward(self.body, tokens, shared, out, shape, initial_state, cu_seqlens, scale, compiled)
        return out, final, kept

    def _forward_fake(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        q, _, v, *_, cu_seqlens, _, _ = args
        return empty_outputs(q, v, cu_seqlens)

    def _backward(self, grad_out: Tensor, grad_final: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
        *operands, kept, cu_seqlens, scale, compiled = args
        q = operands[0]
        kernels = triton_form(q, self.name)
        if kernels is not None:
            found: tuple[Tensor, ...] = kernels.backward(grad_out, grad_final, *operands, kept, cu_seqlens, scale)
            return found
        tokens, shared = self._parted(operands)
        grads, sums, initial = run_backward(
            self.body, tokens, shared, kept, grad_out, grad_final, cu_seqlens, scale, compiled
        )
        return *(or_empty(g, q) for g in (*grads, *sums)), initial

    def _backward_fake(self, grad_out: Tensor, grad_final: Tensor | None, *args: Any) -> tuple[Tensor, ...]:
        *operands, kept, cu_seqlens, _, _ = args
        return empty_gradients(tuple(operands), kept, cu_seqlens)

    def _parted(self, operands: list[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple(operands[: len(self.tokens)]), tuple(operands[len(self.tokens) :])

    @staticmethod
    def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *operands, initial_state, cu_seqlens, ctx.scale, ctx.compiled = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[2])
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        ctx.save_for_backward(*operands, cu_seqlens, output[2])

    @staticmethod
    def _vjp(backward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
        def vjp(ctx: Any, grad_out: Tensor | None, grad_final: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
            *operands, cu_seqlens, kept = ctx.saved_tensors
            grad_out = torch.zeros_like(operands[2]) if grad_out is None else grad_out
            *grads, initial = backward(grad_out, grad_final, *operands, kept, cu_seqlens, ctx.scale, ctx.compiled)
            given = (None if x is None else g for x, g in zip(operands, grads, strict=True))
            return *given, None if ctx.state_dtype is None else initial.to(ctx.state_dtype), None, None, None

        return vjp

    def _forward_flops(self, q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
        batch, length, heads, key = q
        return batch * length * heads * self.flops(key, v[-1])[0]

    def _backward_flops(self, do: Any, df: Any, q: torch.Size, k: Any, v: torch.Size, *args: Any, **kwargs: Any) -> int:
        batch, length, heads, key = q
        return batch * length * heads * self.flops(key, v[-1])[1]
