"""Peaks told by the parted graph: of one known by hand, and of models of all kinds against the allocator's events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mstc.cli.plan.draft import capture
from mstc.passes import memory_budget
from mstc.passes.memory_budget import resident_of
from mstc.plan.devices import local
from mstc.plan.parted import Schedule, part, schedule_of
from mstc.plan.solve import least_peak
from mstc.plan.stages import Extra, as_read
from testkit.budgets import peaks_at
from testkit.capture import normal_module
from testkit.hf_models import config_of
from testkit.shares import first_of
from testkit.shrunk import from_settings, shrink

TOKENS = 1024
# Experts in one product and one by one, windows, scans written in ops, memories, biases of all pairs of tokens.
KINDS = (
    *("mixtral", "gpt_oss", "afmoe", "aria_text", "olmoe", "phimoe", "qwen2_moe", "lfm2", "bamba", "qwen3_next"),
    *("gemma2", "cohere2", "mistral", "minimax", "mpt", "bloom", "codegen"),
)

Loss = Callable[[Tensor], Tensor]


pytestmark = pytest.mark.usefixtures("one_thread")


def _training(kind: str) -> tuple[nn.Module, Loss]:
    config = shrink(config_of(kind))
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if type(getattr(config, name, None)) is int:
            setattr(config, name, TOKENS)
    if getattr(config, "sliding_window", None):
        config.sliding_window = 128
    model = from_settings("AutoModelForCausalLM", config, 10**7)
    return model, lambda ids: model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


def _schedule(fn: Callable[..., Any], *inputs: Tensor, lower: str = "aot_eager") -> Schedule:
    return schedule_of(part(normal_module(fn, *inputs), True, lower), "cpu")


def test_a_chain_by_hand() -> None:
    """[64, 64] floats of 16 KiB each: the backward of sin reads what mm made, that of exp what it made itself."""
    x, w = torch.randn(64, 64), torch.randn(64, 64, requires_grad=True)
    found = _schedule(lambda x, w: (x @ w).sin().exp().sum(), x, w)
    kib = [p.total // 1024 for p in found.timeline.points if not p.backward]
    assert kib == [48, 64, 80, 64]  # x, w, mm; sin beside them; exp beside these; sin is gone when the sum is taken
    assert {n.name: size // 1024 for n, size in found.saved.items()} == {"mm": 16, "exp": 16}
    assert found.timeline.peak.backward


def test_fused_what_no_other_op_needs_whole_is_never_there() -> None:
    x, w = torch.randn(64, 64), torch.randn(64, 64, requires_grad=True)
    by_op, fused = (
        _schedule(lambda x, w: (x @ w).sin().exp().sum(), x, w, lower=one) for one in ("aot_eager", "inductor")
    )
    assert [r.node.name for r in fused.forward] == ["mm", "sum_1"]
    assert fused.timeline.peak.total < by_op.timeline.peak.total


@pytest.mark.parametrize("lower", first_of(["aot_eager", "inductor"], ["inductor"]))
def test_what_is_saved_is_so_on_no_device(lower: str) -> None:
    """A step on meta tensors, as `mstc plan` reads it, is parted as on a CPU."""
    model, loss_fn = _training("lfm2")
    ids = torch.zeros(2, 256, dtype=torch.long)

    def saved(ids: Tensor) -> list[int]:
        return [e.saved for e in capture(loss_fn, [ids], local("cpu"), lower).extras]

    here = saved(ids)
    model.to("meta")
    assert saved(ids.to("meta")) == pytest.approx(here, abs=2**14)


def test_the_stages_add_up_to_the_parted_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what each holds besides, they tell the peak that the graph as it was read has."""
    found: list[Schedule] = []
    plain = memory_budget._schedule
    monkeypatch.setattr(memory_budget, "_schedule", lambda *args: found.append(plain(*args)) or found[-1])
    _, loss_fn = _training("mixtral")
    draft = capture(loss_fn, [torch.zeros(2, TOKENS, dtype=torch.long)], local("cpu"), "aot_eager")
    assert set(draft.extras) != {Extra()}
    stages = [
        replace(stage, options=(extra.of(stage.options[0]),))
        for stage, extra in zip(as_read(draft.step, draft.device, draft.dtype), draft.extras, strict=True)
    ]
    solution = least_peak(stages, resident_of(draft.step))
    assert solution.peak == pytest.approx(found[0].timeline.peak.total, rel=1e-3)


@pytest.mark.parametrize("kind", first_of(KINDS, ["mixtral"]))
@pytest.mark.parametrize(
    "lower", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]
)
def test_the_predicted_peak_is_measured(lower: str, kind: str) -> None:
    model, loss_fn = _training(kind)
    ids = torch.randint(0, 96, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    predicted, peak = peaks_at(0.3, loss_fn, ids, model, lower, kind)
    assert predicted == pytest.approx(peak, rel=0.05)
