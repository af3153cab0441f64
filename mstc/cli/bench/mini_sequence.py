"""Mini-Sequence Transformer (Luo et al., arXiv 2407.15892) as in its published code, but for its mistakes.

Every layer runs again in its backward; MLPs run in pieces of the sequence, whose intermediates autograd keeps until the
layer's backward is done; so does the head, whose logits are computed again in the backward. The published head's
gradient is twice too large where parameters have one already, and tokens of an odd tail get no loss; not here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["HEAD_PIECES", "MLP_PIECES", "cut_mlps", "head_loss"]

MLP_PIECES = 8  # the defaults of the published implementation
HEAD_PIECES = 16


def cut_mlps(model: nn.Module) -> None:
    """Make every module's ``mlp`` run in pieces."""
    for module in list(model.modules()):
        mlp = getattr(module, "mlp", None)
        if isinstance(mlp, nn.Module):
            module.mlp = _Pieces(mlp)


def head_loss(hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Cross-entropy, summed over ``hidden`` [B, S, D] and ``labels`` [B, S], piece by piece."""
    length = math.ceil(hidden.shape[1] / HEAD_PIECES)
    pieces = [piece.contiguous() for piece in torch.split(hidden, length, 1)]
    losses = [
        _HeadPiece.apply(piece, targets, weight)  # type: ignore[no-untyped-call]
        for piece, targets in zip(pieces, torch.split(labels, length, 1), strict=True)
    ]
    total: Tensor = sum(losses[1:], losses[0])
    return total


class _Pieces(nn.Module):
    """An MLP piece by piece, its outputs put together; a residual that it adds itself comes as another input."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, *inputs: Tensor) -> Tensor:
        split = [torch.split(x, math.ceil(x.shape[1] / MLP_PIECES), 1) for x in inputs]
        return torch.cat([self.mlp(*pieces) for pieces in zip(*split, strict=True)], 1)


class _HeadPiece(torch.autograd.Function):
    """Head and loss of one piece. The backward computes the logits again, in float32 beside their gradient, and adds
    to the weight's gradient by itself: nothing that waits for that gradient hears of it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, labels, weight)
        return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, -2), labels.flatten(), reduction="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, labels, weight = ctx.saved_tensors
        logits = F.linear(hidden, weight).float()
        gradient = F.softmax(logits, dim=-1)
        at = labels.unsqueeze(-1)
        gradient.scatter_add_(-1, at, gradient.new_full((1, 1, 1), -1.0).expand(at.shape))
        narrow = gradient.mul_(grads[0]).to(hidden.dtype)
        del gradient
        flat = narrow.flatten(0, -2).t()
        if weight.grad is None:
            weight.grad = flat @ hidden.flatten(0, -2)
        else:
            weight.grad.addmm_(flat, hidden.flatten(0, -2))
        del logits
        return narrow @ weight, None, None
