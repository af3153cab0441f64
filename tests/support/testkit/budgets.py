"""A step under a memory budget: one that can be met, and what is predicted and measured under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mstc.cli.plan.draft import capture
from mstc.passes.memory_budget import resident_of
from mstc.plan.devices import local
from mstc.plan.solve import least_peak, solve
from testkit.allocator import measured_peak, predicted_mib

__all__ = ["peaks_at"]

MIB = 2**20


def peaks_at(
    share: float, loss_fn: Callable[[Tensor], Tensor], ids: Tensor, model: nn.Module, lower: str, label: str
) -> tuple[float, float]:
    """The peak that the plan tells and the one measured, in MiB; printed behind the budget, as a row of a table.

    share: of the way from the least peak (the graph itself holds a little more than the plan adds up: 3% above it) to
    the fastest plan's.
    """
    draft = capture(loss_fn, [ids], local("cpu"), lower)
    stages, resident = draft.stages(), resident_of(draft.step)
    least, fastest = least_peak(stages, resident), solve(stages, resident)
    assert fastest is not None
    budget = int(1.03 * least.peak + share * max(fastest.peak - least.peak, 0))
    torch._dynamo.reset()
    options: dict[str, Any] = {"lower": lower, "memory_budget": budget}
    fn = torch.compile(loss_fn, backend="mstc", options=options, dynamic=False)
    fn(ids).backward()
    predicted, peak = predicted_mib(), measured_peak(lambda: fn(ids).backward(), model) / MIB
    figures = " | ".join(f"{x:.3f}" for x in (budget / MIB, predicted, peak, predicted / peak))
    print(f"\n| {lower} | {label} | {figures} |")
    return predicted, peak
