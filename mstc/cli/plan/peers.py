"""Other ways to run the same step, as published, in eager PyTorch on meta tensors.

plain: the model as it is. checkpointing: every layer runs again in its backward. mini-sequence: checkpointing, MLPs in
8 pieces (whose intermediates autograd keeps until the layer's backward is done) and the head in 16, whose logits are
computed again in the backward. The head and loss of the other two are those of Hugging Face transformers at the time:
logits in float32, a shifted copy of them, and the logits held by the model's output through the backward. Attention is
FlashAttention-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mstc.cli.bench.models import checkpoint_layers
from mstc.cli.plan.blocks import fits
from mstc.cli.plan.models import build
from mstc.cli.plan.setting import Setting
from mstc.cli.plan.tracker import Tracker, flash

MLP_PIECES = 8  # the defaults of the published implementation
HEAD_PIECES = 16
SYSTEMS = {"plain": "plain", "checkpointing": "checkpointing", "mini-sequence": "Mini-Sequence (published)"}


@dataclass(frozen=True)
class Usage:
    """Peak bytes by category, seconds of a step, and in order what it makes and frees (as `blocks.fits` takes it)."""

    held: dict[str, int]
    seconds: float
    events: list[tuple[int, int]]

    @property
    def peak(self) -> int:
        return sum(self.held.values())

    def fits_in_blocks(self, budget: int) -> bool:
        """Whether it has room in what PyTorch's allocator hands out beside parameters and optimizer state."""
        return fits(self.events, budget - self.held["parameters"] - self.held["optimizer"])


class Peer:
    """One system on one configuration; `usage` runs a step of a given length."""

    def __init__(self, system: str, config: Any, setting: Setting) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register("mstc_tracked", flash)
        self._model = build(config, config.num_hidden_layers, setting.dtype, "mstc_tracked")
        self._setting, self._optimizer = setting, setting.optimizer
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._loss: Callable[[Tensor], Any] = self._plain_loss
        if system != "plain":
            checkpoint_layers(self._model, use_reentrant=True, preserve_rng_state=False)
        if system == "mini-sequence":
            for module in list(self._model.modules()):
                if hasattr(module, "mlp"):
                    module.mlp = _Pieces(module.mlp)
            self._loss = self._pieces_loss

    def usage(self, seq: int) -> Usage:
        """A step of ``seq`` tokens per sequence."""
        device, precision = self._setting.device, self._setting.precision
        parameters = sum(p.numel() * p.element_size() for p in self._parameters)
        state = self._optimizer.state_bytes(self._parameters)
        tracker = Tracker(device, precision)
        for t in (*self._model.parameters(), *self._model.buffers()):
            tracker.know(t)
        hooks = []
        if self._optimizer.in_backward:
            hooks = [p.register_post_accumulate_grad_hook(_apply) for p in self._parameters]
        ids = torch.zeros(self._setting.batch, seq, dtype=torch.long, device="meta")
        with tracker:
            out = self._loss(ids)
            torch.autograd.backward(out[0])
            del out
            peak = tracker.peak
            if not self._optimizer.in_backward:
                peak = max(peak, tracker.live + self._optimizer.step_bytes(self._parameters))
        for hook in hooks:
            hook.remove()
        self._model.zero_grad(set_to_none=True)
        held = {"parameters": parameters, "optimizer": state, "gradients and activations": peak}
        moved = 3.0 * (parameters + state)
        return Usage(held, tracker.seconds + device.seconds(0, moved, 0, 1, precision), tracker.events)

    def _plain_loss(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self._model.model(input_ids=ids).last_hidden_state
        logits = self._model.lm_head(hidden).float()
        del hidden
        shifted = logits[..., :-1, :].contiguous()
        return F.cross_entropy(shifted.flatten(0, 1), ids[:, 1:].flatten()), logits

    def _pieces_loss(self, ids: Tensor) -> tuple[Tensor, None]:
        hidden = self._model.model(input_ids=ids).last_hidden_state[:, :-1]
        length = math.ceil(hidden.shape[1] / HEAD_PIECES)
        pieces = [piece.contiguous() for piece in torch.split(hidden, length, 1)]
        losses = [_HeadPiece.apply(h, self._model.lm_head.weight) for h in pieces]  # type: ignore[no-untyped-call]
        total: Tensor = sum(losses) / ids.numel()
        return total, None


def _apply(p: Tensor) -> None:
    """Adam on one parameter: two temporaries of its size, then the gradient goes."""
    first, second = torch.empty_like(p), torch.empty_like(p)
    del first, second
    p.grad = None


class _Pieces(nn.Module):
    """An MLP piece by piece, its outputs put together."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.mlp(piece) for piece in torch.split(x, math.ceil(x.shape[1] / MLP_PIECES), 1)], 1)


class _HeadPiece(torch.autograd.Function):
    """Head and loss of one piece. The backward computes the logits again, in float32 beside their gradient, and adds
    to the weight's gradient by itself: nothing that waits for that gradient hears of it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        labels = torch.zeros(hidden.shape[:-1], dtype=torch.long, device=hidden.device)
        return F.cross_entropy(F.linear(hidden, weight).float().flatten(0, -2), labels.flatten(), reduction="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight = ctx.saved_tensors
        logits = F.linear(hidden, weight).float()
        gradient = F.softmax(logits, dim=-1).to(hidden.dtype)
        made = gradient.flatten(0, -2).t() @ hidden.flatten(0, -2)
        weight.grad = made if weight.grad is None else weight.grad.add_(made)
        del logits
        return (gradient @ weight).mul_(grads[0]), None
