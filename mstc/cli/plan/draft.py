"""The step that mstc would run, drafted from a capture on meta tensors at one length and evaluated at any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mstc.cli.plan.models import Target, build, loss_of
from mstc.cli.plan.setting import Setting
from mstc.cli.target import tracing
from mstc.errors import PlanError
from mstc.graph.normal_form import NotNormalError, normalize
from mstc.options import parse_options
from mstc.passes.base import Context
from mstc.passes.memory_budget import Draft, draft_of
from mstc.pipeline import prepare
from mstc.plan.devices import Device
from mstc.plan.lengths import at_length
from mstc.plan.solve import Solution, frontier, least_peak, solve
from mstc.plan.stages import ALL_LEVERS, Levers, Stage, stages_of
from mstc.report import Report

CAPTURED_LAYERS = 4  # the first, the last, and two between them: models that alternate layers have a period of two
CAPTURED_TOKENS = 8192


@dataclass(frozen=True)
class Planned:
    """A step of any length: ``parameters`` and ``state`` in bytes, of all layers."""

    draft: Draft
    tokens: int
    layers: int
    parameters: int
    state: int
    stepping: int
    device: Device

    def stages(self, tokens: int, levers: Levers = ALL_LEVERS) -> list[Stage]:
        """The stages at a length, those of the layers that were not captured filled in."""
        step = at_length(self.draft.step, self.tokens, tokens)
        stages = stages_of(step, self.device, self.draft.dtype, levers)
        missing = self.layers - CAPTURED_LAYERS
        if self.layers == 0 or missing <= 0:
            return stages
        middle = stages[1:3]
        filled = [middle[i % 2] for i in range(missing)]
        return [*stages[:3], *filled, *stages[3:]]

    @property
    def resident(self) -> int:
        return self.parameters + self.state

    def fastest(self, tokens: int, budget: int, levers: Levers = ALL_LEVERS) -> Solution | None:
        if self.resident + self.gradients + self.stepping > budget:
            return None
        return solve(self.stages(tokens, levers), self.resident, budget)

    @property
    def gradients(self) -> int:
        return self.parameters

    def least(self, tokens: int) -> Solution:
        return least_peak(self.stages(tokens), self.resident)

    def frontier(self, tokens: int) -> list[Solution]:
        return frontier(self.stages(tokens), self.resident)

    def longest(self, budget: int, levers: Levers = ALL_LEVERS, grain: int = 1024) -> int:
        """The most tokens that fit, in steps of ``grain``; 0 where none does."""
        low, high = 0, grain
        while high <= 1 << 26 and self.fastest(high, budget, levers) is not None:
            low, high = high, 2 * high
        while high - low > grain:
            middle = (low + high) // 2 // grain * grain
            if self.fastest(middle, budget, levers) is not None:
                low = middle
            else:
                high = middle
        return low


def plan_for(target: Target, setting: Setting, tokens: int = CAPTURED_TOKENS) -> Planned:
    """Capture the target and draft its step."""
    batch, dtype, device, optimizer = setting.batch, setting.dtype, setting.device, setting.optimizer
    if target.config is None:
        function, inputs = target.made(tokens, batch, dtype)
        with tracing(target.name):
            draft = capture(function, inputs, device)
        parameters = sum(draft.step.sizes[m] for m in draft.step.parameters)
        count = parameters // (getattr(torch, draft.dtype) if target.of_user else dtype).itemsize
        layers = 0
    else:
        whole = build(target.config, target.layers, dtype)
        count = sum(p.numel() for p in whole.parameters())
        parameters = count * dtype.itemsize
        model = build(target.config, min(target.layers, CAPTURED_LAYERS), dtype)
        ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
        draft = capture(loss_of(model), [ids], device)
        layers = target.layers
    state = int(optimizer.state * count)
    return Planned(draft, tokens, layers, parameters, state, int(optimizer.step * count), device)


def capture(function: Callable[..., Any], inputs: Sequence[Any], device: Device, lower: str = "inductor") -> Draft:
    found: list[Draft] = []

    def backend(gm: torch.fx.GraphModule, example: Sequence[Any]) -> Any:
        try:
            form = normalize(gm, example)
        except NotNormalError as error:
            raise PlanError(f"the step cannot be planned: {error}") from error
        ctx = Context(parse_options({"lower": lower}), form.training)
        prepare(form.gm, ctx, Report())
        found.append(draft_of(form.gm, ctx, device))
        return gm.forward

    torch.compiler.reset()
    torch.compile(function, backend=backend, dynamic=False)(*inputs)
    if len(found) != 1:
        raise PlanError(
            f"the step was captured in {len(found)} graphs; plan a function that is one graph (`mstc dump` shows "
            "where graphs end, and why)"
        )
    return found[0]
