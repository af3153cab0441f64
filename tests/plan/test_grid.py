"""Predicted against measured peaks on models x lengths x budgets, by the allocator's events on the CPU.

A small part runs in CI; the rest is slow, and its table stands in docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mstc
from mstc.cli.plan.draft import capture
from mstc.passes.memory_budget import resident_of
from mstc.plan.devices import local
from mstc.plan.solve import least_peak, solve
from testkit.allocator import measured_peak
from testkit.hf_models import FOR_PEAKS, in_training

MIB = 2**20
MODELS = ("llama", "qwen2", "phi3", "olmo2")
LENGTHS = (1024, 2048, 4096)
SHARES = (0.0, 0.3, 1.0)  # of the way from the least peak to the fastest plan's
LOWERS = ("aot_eager", "inductor")
_CI = {("llama", 1024, 0.3)}
POINTS = [
    pytest.param(m, n, s, marks=[] if (m, n, s) in _CI else pytest.mark.slow)
    for m in MODELS
    for n in LENGTHS
    for s in SHARES
]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("kind", "length", "share"), POINTS)
@pytest.mark.parametrize("lower", LOWERS)
def test_the_predicted_peak_is_measured(lower: str, kind: str, length: int, share: float) -> None:
    model, loss_fn = in_training(kind, **FOR_PEAKS)
    ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(0))
    budget, predicted = _budget(loss_fn, ids, share, lower)
    torch._dynamo.reset()
    options: dict[str, Any] = {"lower": lower, "memory_budget": budget}
    fn = torch.compile(loss_fn, backend="mstc", options=options, dynamic=False)
    fn(ids).backward()
    peak = measured_peak(lambda: fn(ids).backward(), model)
    found = (budget / MIB, predicted / MIB, peak / MIB, predicted / peak)
    print(f"\n| {lower} | {kind} | {length} | " + " | ".join(f"{x:.3f}" for x in found) + " |")
    assert mstc.reports()[-1].plan
    assert predicted == pytest.approx(peak, rel=0.05)


def _budget(loss_fn: Any, ids: Tensor, share: float, lower: str) -> tuple[int, int]:
    """A budget between the least and the fastest plan's peak, and the peak predicted under it."""
    device = local("cpu")
    draft = capture(loss_fn, [ids], device, lower)
    stages, resident = draft.stages(), resident_of(draft.step)
    least, fastest = least_peak(stages, resident), solve(stages, resident)
    assert fastest is not None
    budget = int(1.02 * least.peak + share * (fastest.peak - least.peak))  # the graph itself holds a little more
    found = solve(stages, resident, budget)
    assert found is not None
    return budget, found.peak
