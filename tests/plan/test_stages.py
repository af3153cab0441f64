"""Stages measured one by one add up to the whole schedule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from mstc.cli.plan.draft import capture
from mstc.passes.memory_budget import Draft, chosen_step, resident_of
from mstc.plan.devices import local
from mstc.plan.memory import simulate
from mstc.plan.solve import frontier, solve
from mstc.plan.stages import Levers, stages_of
from testkit.hf_models import in_training
from testkit.shares import first_of
from testkit.stacks import WIRINGS, AttentionResidual, Stack

_SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 3,
    "head_dim": 128,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _draft(kind: str) -> Draft:
    _, loss_fn = in_training(kind, **_SIZES)
    return capture(loss_fn, [torch.zeros(1, 1024, dtype=torch.long)], local("cpu"), "aot_eager")


def _wired(kind: str) -> Draft:
    model = AttentionResidual(5, 128, 256) if kind == "residual" else Stack(kind, 6, 128, 256)
    return capture(lambda ids: model(ids), [torch.zeros(1, 1024, dtype=torch.long)], local("cpu"), "aot_eager")


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", first_of(["llama", "phi3", *WIRINGS, "residual"], ["llama", "keys", "residual"]))
def test_what_the_solver_promises_is_what_the_schedule_holds(kind: str, offload: bool) -> None:
    """Also where layers read more than the one before them."""
    draft = _wired(kind) if kind in WIRINGS or kind == "residual" else _draft(kind)
    stages = stages_of(draft.step, draft.device, draft.dtype, Levers(offload=offload))
    plans = frontier(stages, resident_of(draft.step), most=16)
    assert len(plans) > 5
    for plan in plans:
        held = simulate(chosen_step(draft, stages, plan)).peak.total
        assert held <= 1.002 * plan.peak
        assert held >= 0.97 * plan.peak


def test_memory_to_spare_is_spent_on_what_would_be_computed_again() -> None:
    draft = _draft("llama")
    stages = stages_of(draft.step, draft.device, draft.dtype)
    spare, tight = frontier(stages, resident_of(draft.step), most=2)
    without = frontier(stages_of(draft.step, draft.device, draft.dtype, Levers(saves=False)), resident_of(draft.step))
    assert spare.seconds < tight.seconds
    assert spare.seconds < without[0].seconds and spare.peak > without[0].peak
    assert all(not any(o.choice.saves) for o in without[0].options)
    assert [o.choice.saves[-1] > 0 for o in spare.options if len(o.choice.saves) == 2] == [True] * 3


def test_where_fresh_pages_are_slow_a_large_budget_still_means_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = _draft("llama")

    def chunks(link: float) -> list[int]:
        device = replace(draft.device, link=link)
        plan = solve(stages_of(draft.step, device, draft.dtype), resident_of(draft.step))
        assert plan is not None
        return [max(o.choice.counts) for o in plan.options if o.choice.counts]

    assert set(chunks(1e8)) == {1}, "small blocks lie on the heap, whose pages are there"
    monkeypatch.setattr("mstc.plan.work.HEAP", 0)
    assert set(chunks(1e15)) == {1}
    assert min(chunks(1e8)) > 1
