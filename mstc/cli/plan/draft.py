"""The step that mstc would run, drafted from a capture on meta tensors at one length and evaluated at any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mstc import compat
from mstc.cli.plan.building import build, loss_of
from mstc.cli.plan.layers import Layers, shortened
from mstc.cli.plan.models import Target
from mstc.cli.plan.search import last_that_fits
from mstc.cli.plan.setting import Setting
from mstc.cli.target import tracing
from mstc.compat import autocast
from mstc.errors import PlanError
from mstc.graph.normal_form import NotNormalError, normalize
from mstc.options import parse_options
from mstc.passes.base import Context, not_compiled
from mstc.passes.memory_budget import Draft, draft_of
from mstc.pipeline import prepare
from mstc.plan.devices import Device
from mstc.plan.lengths import Growing, readings
from mstc.plan.solve import Solution, fits, frontier, least_bytes, least_peak, solve
from mstc.plan.stages import ALL_LEVERS, Levers, Stage, stages_of
from mstc.report import Report

CAPTURED_TOKENS = 8192  # the shortest of the lengths at which a step is read, where the model has so many positions


@dataclass(frozen=True)
class Planned:
    """A step of any length: ``parameters``, ``state`` and ``stepping`` in bytes, of all layers; dtype: by name, of its
    products; layers: those that were captured, None where that is the whole step; positions: as of `Target`."""

    growing: Growing
    dtype: str
    layers: Layers | None
    parameters: int
    state: int
    stepping: int
    device: Device
    positions: int | None = None

    def stages(self, tokens: int, levers: Levers = ALL_LEVERS) -> list[Stage]:
        """The stages at a length, those of the layers that were not captured filled in."""
        step, extras = self.growing.at(tokens), self.growing.extras_at(tokens)
        stages = stages_of(step, self.device, self.dtype, levers, extras)
        return _filled(stages, self.layers) if self.layers is not None and self.layers.missing else stages

    @property
    def resident(self) -> int:
        return self.parameters + self.state

    def fastest(self, tokens: int, budget: int, levers: Levers = ALL_LEVERS) -> Solution | None:
        if self.stepped > budget:
            return None
        return solve(self.stages(tokens, levers), self.resident, budget)

    @property
    def gradients(self) -> int:
        return self.parameters

    @property
    def stepped(self) -> int:
        """Bytes that are held while the optimizer steps."""
        return self.resident + self.gradients + self.stepping

    def least(self, tokens: int) -> Solution:
        return least_peak(self.stages(tokens), self.resident)

    def frontier(self, tokens: int) -> list[Solution]:
        return frontier(self.stages(tokens), self.resident)

    def longest(self, budget: int, levers: Levers = ALL_LEVERS, grain: int = 1024) -> int:
        """The most tokens that fit, in steps of ``grain``, or all for which there are positions; 0 where none does."""
        if self.stepped > budget:
            return 0

        def over(tokens: int) -> int:
            stages = self.stages(tokens, levers)
            above = least_bytes(stages, self.resident) - budget
            return min(above, 0) if fits(stages, self.resident, budget) else max(above, 1)

        if self.positions and over(self.positions) <= 0:
            return self.positions
        return last_that_fits(over, grain)


def _filled(stages: list[Stage], layers: Layers) -> list[Stage]:
    """With stages for the layers that were left out, behind those that they repeat."""
    own = [stage.calls[-1].layer for stage in stages]
    at = [i for i, layer in enumerate(own) if layer in layers.repeated]
    assert at and at == list(range(at[0], at[-1] + 1)), "the layers' stages do not stand one behind the other"
    repeated = [stages[i] for i in at] * (layers.missing // layers.period)
    return [*stages[: at[-1] + 1], *repeated, *stages[at[-1] + 1 :]]


def plan_for(target: Target, setting: Setting, tokens: int = CAPTURED_TOKENS) -> Planned:
    """Read the target's step at three lengths, of which ``tokens`` is the shortest (less where positions end)."""
    batch, dtype, device, optimizer = setting.batch, setting.dtype, setting.device, setting.optimizer
    layers = None
    if target.config is not None:
        model = build(target.config, dtype)
        count = sum(p.numel() for p in model.parameters())
        layers = shortened(model, model.config.get_text_config())
        loss_fn = loss_of(model)

    def draft_at(length: int) -> Draft:
        if target.config is None:
            function, inputs = target.made(length, batch, dtype)
        else:
            function, inputs = loss_fn, [torch.zeros(batch, length, dtype=torch.long, device="meta")]
        with tracing(target.name):
            return capture(function, inputs, device)

    lengths = readings(min(tokens, target.positions // 2) if target.positions else tokens)
    drafts = [draft_at(length) for length in lengths]
    first = drafts[0]
    if target.config is None:
        parameters = sum(first.step.sizes[m] for m in first.step.parameters)
        count = parameters // (getattr(torch, first.dtype) if target.of_user else dtype).itemsize
    else:
        parameters = count * dtype.itemsize
    growing = Growing(lengths, [d.step for d in drafts], [d.extras for d in drafts])
    state, stepping = int(optimizer.state * count), int(optimizer.step * count)
    return Planned(growing, first.dtype, layers, parameters, state, stepping, device, target.positions)


def capture(function: Callable[..., Any], inputs: Sequence[Any], device: Device, lower: str = "inductor") -> Draft:
    found: list[Draft] = []

    def backend(gm: torch.fx.GraphModule, example: Sequence[Any]) -> Any:
        try:
            form = normalize(gm, example)
        except NotNormalError as error:
            raise PlanError(f"the step cannot be planned: {error}") from error
        options = parse_options({"lower": lower, "memory_budget": device.usable()})
        ctx = Context(options, form.training, compile_body=not_compiled, explained=True)
        with autocast.off_at_run_time():
            prepare(form.gm, ctx, Report())
            found.append(draft_of(form.gm, ctx, device))
        return gm.forward

    torch.compiler.reset()
    with compat.beside_real_tensors():
        torch.compile(function, backend=backend, dynamic=False)(*inputs)
    if len(found) != 1:
        raise PlanError(
            f"the step was captured in {len(found)} graphs; plan a function that is one graph (`mstc dump` shows "
            "where graphs end, and why)"
        )
    return found[0]
