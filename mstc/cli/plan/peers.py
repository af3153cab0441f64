"""Other ways to run the same step, as published, in eager PyTorch on meta tensors.

plain: the model as it is. checkpointing: every layer runs again in its backward. mini-sequence: as
`mstc.cli.bench.mini_sequence` has it. The head and loss of the other two are those of Hugging Face transformers at the
time: logits in float32, a shifted copy of them, and the logits held by the model's output through the backward.
Attention is FlashAttention-2 where the model has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mstc.cli.bench.mini_sequence import cut_mlps, head_loss
from mstc.cli.bench.models import checkpoint_layers
from mstc.cli.plan.blocks import fits
from mstc.cli.plan.building import build, eager_attention, is_causal
from mstc.cli.plan.models import Target
from mstc.cli.plan.setting import Setting
from mstc.cli.plan.tracker import Tracker, flash
from mstc.plan.lengths import polynomial

FLASH = "mstc_tracked"  # the name of `flash` among the attentions of transformers
SYSTEMS = {"plain": "plain", "checkpointing": "checkpointing", "mini-sequence": "Mini-Sequence (published)"}


def systems_for(target: Target) -> tuple[str, ...]:
    """The systems that run the target: those of configurations whose attention is known, and Mini-Sequence those whose
    head is one matrix on the last hidden state."""
    if target.config is None or eager_attention(target.config, FLASH) is None:
        return ()
    return tuple(SYSTEMS) if is_causal(target.config) else ("plain", "checkpointing")


def readings_for(target: Target) -> tuple[int, int, int]:
    """The tokens at which a schedule is read; pieces of all are even."""
    short = 1024 if target.positions is None else min(1024, target.positions // 64 * 16)
    return short, 2 * short, 4 * short


@dataclass(frozen=True)
class Usage:
    """Peak bytes by category and seconds of a step."""

    held: dict[str, int]
    seconds: float

    @property
    def peak(self) -> int:
        return sum(self.held.values())


@dataclass(frozen=True)
class Schedule:
    """What a step makes and frees, in order, for any length: sizes are polynomials of the second degree in the tokens
    (scores of all pairs), and their order does not change.

    resident: bytes that rest between steps; stepping: those that the optimizer takes beside what the step leaves;
    readings: events (as `Tracker.events`) by the three lengths at which they were read.
    """

    resident: int
    stepping: int
    readings: Mapping[int, Sequence[tuple[int, int]]]

    def __post_init__(self) -> None:
        counts = {len(events) for events in self.readings.values()}
        assert len(self.readings) == 3 and len(counts) == 1, "what a step makes and frees depends on its length"

    def events(self, tokens: int) -> list[tuple[int, int]]:
        """The events of a step of so many tokens per sequence."""
        known = tuple(self.readings)
        names = [name for name, _ in self.readings[known[0]]]
        sizes = list(zip(*([size for _, size in events] for events in self.readings.values()), strict=True))
        there = {each: int(polynomial(known, each).eval(tokens)) for each in set(sizes)}
        return [(name, there[each]) for name, each in zip(names, sizes, strict=True)]

    def peak(self, tokens: int) -> int:
        live = most = 0
        held: dict[int, int] = {}
        for name, nbytes in self.events(tokens):
            if nbytes:
                held[name] = nbytes
                live += nbytes
                most = max(most, live)
            else:
                live -= held.pop(name)
        return self.resident + max(most, live + self.stepping if self.stepping else 0)

    def fits_in_blocks(self, tokens: int, budget: int) -> bool:
        """Whether it has room in what PyTorch's allocator hands out beside parameters and optimizer state."""
        return fits(self.events(tokens), budget - self.resident)


class Peer:
    """One system on one configuration: `usage` runs a step of a given length, `schedule` tells those of all."""

    def __init__(self, system: str, config: Any, setting: Setting) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(FLASH, flash)
        self._model = build(config, setting.dtype, eager_attention(config, FLASH))
        self._setting, self._optimizer = setting, setting.optimizer
        self._parameters = [p for p in self._model.parameters() if p.requires_grad]
        self._loss: Callable[[Tensor], Any] = self._shifted_loss if is_causal(config) else self._own_loss
        if system != "plain":
            checkpoint_layers(self._model, use_reentrant=True, preserve_rng_state=False)
        if system == "mini-sequence":
            cut_mlps(self._model)
            self._loss = self._pieces_loss

    def schedule(self, *readings: int) -> Schedule:
        """Of a step of any length, read at three."""
        stepping = 0 if self._optimizer.in_backward else self._optimizer.step_bytes(self._parameters)
        resident = self._bytes() + self._optimizer.state_bytes(self._parameters)
        return Schedule(resident, stepping, {n: self._run(n).events for n in readings})

    def usage(self, seq: int) -> Usage:
        """A step of ``seq`` tokens per sequence."""
        parameters, state = self._bytes(), self._optimizer.state_bytes(self._parameters)
        tracker = self._run(seq)
        peak = tracker.peak
        if not self._optimizer.in_backward:
            peak = max(peak, tracker.live + self._optimizer.step_bytes(self._parameters))
        held = {"parameters": parameters, "optimizer": state, "gradients and activations": peak}
        applying = self._setting.device.seconds(0, 3.0 * (parameters + state), 0, 1, self._setting.precision)
        return Usage(held, tracker.seconds + applying)

    def _bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self._parameters)

    def _run(self, seq: int) -> Tracker:
        """What a step of ``seq`` tokens made, up to its gradients."""
        tracker = Tracker(self._setting.device, self._setting.precision)
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
            tracker.close()
        for hook in hooks:
            hook.remove()
        self._model.zero_grad(set_to_none=True)
        return tracker

    def _shifted_loss(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._model(input_ids=ids).logits.float()
        shifted = logits[..., :-1, :].contiguous()
        return F.cross_entropy(shifted.flatten(0, 1), ids[:, 1:].flatten()), logits

    def _own_loss(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self._model(input_ids=ids, labels=ids)
        return out.loss, out.logits

    def _pieces_loss(self, ids: Tensor) -> tuple[Tensor, None]:
        hidden = self._model.base_model(input_ids=ids).last_hidden_state[:, :-1]
        return head_loss(hidden, ids[:, 1:], self._model.get_output_embeddings().weight) / ids.numel(), None


def _apply(p: Tensor) -> None:
    """Adam on one parameter: two temporaries of its size, then the gradient goes."""
    first, second = torch.empty_like(p), torch.empty_like(p)
    del first, second
    p.grad = None
