"""``mstc::attention_shape``: attention by its shapes alone, for graphs on the meta device that are planned for another.

    attention_shape(q, k, v, mask) -> (output, log-sum-exp);   its backward -> gradients of q, k, v

On the meta device PyTorch would take attention apart into scores of S x S, which no kernel of a GPU makes. It never
runs; a mask gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

torch.library.define("mstc::attention_shape", "(Tensor q, Tensor k, Tensor v, Tensor? mask) -> (Tensor, Tensor)")
torch.library.define(
    "mstc::attention_shape_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor out, Tensor lse) -> (Tensor, Tensor, Tensor)",
)
SHAPE = torch.ops.mstc.attention_shape.default
SHAPE_BACKWARD = torch.ops.mstc.attention_shape_backward.default


def _fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output lies as the fused kernels leave it: heads inside of tokens."""
    shape = [*q.shape[:-1], v.shape[-1]]
    if q.dim() > 2:
        order = [*range(q.dim() - 3), q.dim() - 2, q.dim() - 3, q.dim() - 1]
        out = q.new_empty([shape[d] for d in order]).permute(order)
    else:
        out = q.new_empty(shape)
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _vjp(ctx: Any, grad: Tensor, lse_grad: Any) -> Any:
    return *torch.ops.mstc.attention_shape_backward(grad, *ctx.saved_tensors), None


torch.library.register_fake("mstc::attention_shape", _fake)
torch.library.register_fake("mstc::attention_shape_backward", _fake_backward)
torch.library.register_autograd("mstc::attention_shape", _vjp, setup_context=_setup)
