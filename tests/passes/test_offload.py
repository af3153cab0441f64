"""Offloading under a memory budget: gradients equal bit by bit, a peak lower by what was predicted, tighter budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import mstc
import mstc.lower
from mstc.errors import OptionError
from mstc.options import parse_options
from mstc.passes import memory_budget
from mstc.plan.calls import Step
from mstc.plan.memory import simulate
from testkit.allocator import measured_peak
from testkit.hf_models import FOR_PEAKS, in_training

MIB = 2**20


pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class _Ran:
    """One compilation: the gradients, the predicted schedule, the measured peak, and how much is offloaded."""

    gradients: list[Tensor]
    step: Step
    peak: int

    @property
    def predicted(self) -> int:
        return simulate(self.step).peak.total

    @property
    def offloaded(self) -> int:
        return sum(self.step.sizes[m] for c in self.step.calls for m in c.offloads)


Training = tuple[Any, Callable[[Tensor], Tensor]]  # a model and its loss


def _training(layers: int) -> Training:
    return in_training("llama", **{**FOR_PEAKS, "num_hidden_layers": layers})


def _ids(length: int) -> Tensor:
    return torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(0))


def _compiled(
    of: Training, budget: object, lower: str = "aot_eager", offload: bool = True
) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    options = {"lower": lower, "memory_budget": budget, "recompute": {"offload": offload}}
    return torch.compile(of[1], backend="mstc", options=options, dynamic=False)


def _run(of: Training, ids: Tensor, budget: str, lower: str = "aot_eager") -> _Ran:
    model, fn = of[0], _compiled(of, budget, lower)
    seen: list[Step] = []
    plain = memory_budget.chosen_step

    def spy(*args: Any) -> Step:
        seen.append(plain(*args))
        return seen[-1]

    with mock.patch.object(memory_budget, "chosen_step", spy):
        model.zero_grad()
        fn(ids).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    return _Ran(gradients, seen[-1], measured_peak(lambda: fn(ids).backward(), model))


def _kept(of: Training, ids: Tensor, budget: str, lower: str = "aot_eager") -> _Ran:
    """The same plan, but what it offloads is kept."""
    with mock.patch.object(mstc.lower, "tags_of", return_value=""):
        ran = _run(of, ids, budget, lower)
    return replace(ran, step=replace(ran.step, calls=[replace(c, offloads=()) for c in ran.step.calls]))


def _least(of: Training, ids: Tensor, offload: bool) -> tuple[float, str]:
    """The smallest budget by the message of an impossible one, in MiB."""
    with pytest.raises(BackendCompilerFailed, match="smallest plan needs") as found:
        _compiled(of, MIB, offload=offload)(ids)
    message = str(found.value)
    return float(message.split("give at least ")[1].split(" MiB")[0]), message


def test_gradients_are_bit_equal_and_the_peak_falls_by_what_was_predicted() -> None:
    """And the budget that offloading holds is impossible without; the error names it among the levers."""
    of, ids = _training(6), _ids(2048)
    away, kept = _run(of, ids, "9.6MiB"), _kept(of, ids, "9.6MiB")
    assert all(torch.equal(a, b) for a, b in zip(away.gradients, kept.gradients, strict=True))
    assert away.offloaded > 3 * MIB and kept.offloaded == 0
    assert away.peak <= 9.6 * MIB
    assert away.predicted == pytest.approx(away.peak, rel=0.05)
    assert kept.predicted - away.predicted == pytest.approx(kept.peak - away.peak, rel=0.05)
    assert any("wait for the backward elsewhere" in line for line in mstc.reports()[-1].plan)
    without, message = _least(of, ids, offload=False)
    assert without > 9.6 and "options={'recompute': {'offload': True}} would do with" in message
    assert "offloading brings" in _least(of, ids, offload=True)[1]


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "length", "budget"), [(4, 4096, 16), (6, 4096, 16), (8, 2048, 11)])
@pytest.mark.parametrize("lower", ["aot_eager", "inductor"])
def test_more_models_and_budgets(layers: int, length: int, budget: int, lower: str) -> None:
    of, ids = _training(layers), _ids(length)
    away, kept = (run(of, ids, f"{budget}MiB", lower) for run in (_run, _kept))
    sizes = (away.predicted, away.peak, kept.peak, away.offloaded)
    print(f"\n{layers} layers, {length} tokens, {lower}: " + ", ".join(f"{x / MIB:.2f}" for x in sizes))
    assert away.offloaded > MIB and away.peak < kept.peak
    assert all(torch.equal(a, b) for a, b in zip(away.gradients, kept.gradients, strict=True))
    assert kept.predicted - away.predicted == pytest.approx(kept.peak - away.peak, rel=0.05)
    assert away.predicted == pytest.approx(away.peak, rel=0.05)


def test_nothing_is_offloaded_where_memory_allows() -> None:
    of, ids = _training(1), _ids(1024)
    assert _run(of, ids, "1GiB").offloaded == 0


def test_without_a_budget_the_report_says_that_nothing_is_offloaded() -> None:
    options: dict[str, Any] = {"lower": "aot_eager", "recompute": {"offload": True}}
    torch.compile(torch.sin, backend="mstc", options=options)(torch.ones(3))
    refusal = next(r for r in mstc.reports()[-1].refusals if r.pass_name == "offload")
    assert "without a memory budget" in refusal.reason and "'memory_budget'" in refusal.remedy


def test_offloading_needs_a_compiled_backward() -> None:
    with pytest.raises(OptionError, match=r"'recompute.offload' needs a compiled backward"):
        parse_options({"recompute": {"offload": True}, "lower": "eager"})
