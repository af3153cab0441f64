"""A memory budget: the plan is met, the numbers stay, impossible budgets say what would do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import mstc
from testkit.allocator import measured_peak, predicted_mib
from testkit.hf_models import FOR_PEAKS, in_training
from testkit.shares import first_of
from testkit.stacks import WIRINGS, AttentionResidual, Stack

MIB = 2**20


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _ids(length: int = 1024) -> Tensor:
    return torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(0))


def _compiled(loss_fn: Any, budget: object, dynamic: bool = False) -> Any:
    options: dict[str, Any] = {"lower": "aot_eager", "memory_budget": budget}
    return torch.compile(loss_fn, backend="mstc", options=options, dynamic=dynamic)


def test_the_measured_peak_is_the_predicted_one_and_the_gradients_are_eagers() -> None:
    model, loss_fn = in_training("llama", **FOR_PEAKS)
    ids = _ids()
    expected = loss_fn(ids)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    fn = _compiled(loss_fn, "8MiB")
    model.zero_grad()
    loss = fn(ids)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad - gradient).norm() <= 2e-5 * max(gradient.norm(), 1e-3)
    peak = measured_peak(lambda: fn(ids).backward(), model) / MIB
    assert peak <= 8
    assert predicted_mib() == pytest.approx(peak, rel=0.05, abs=0.5)


@pytest.mark.parametrize("kind", first_of([*WIRINGS, "residual"], ["keys"]))
def test_peaks_of_layers_that_read_more_than_the_one_before(kind: str) -> None:
    torch.manual_seed(0)
    model = AttentionResidual(5, 128, 512) if kind == "residual" else Stack(kind, 6, 128, 512)
    fn, ids = _compiled(model, "23MiB"), _ids()
    fn(ids).backward()
    peak = measured_peak(lambda: fn(ids).backward(), model) / MIB
    assert peak <= 23.5
    assert predicted_mib() == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize(("budget", "saves"), [("8MiB", False), pytest.param("12MiB", True, marks=pytest.mark.slow)])
def test_dynamic_lengths_up_to_the_one_that_was_planned(budget: str, saves: bool) -> None:
    model, loss_fn = in_training("llama", **FOR_PEAKS)
    fn = _compiled(loss_fn, budget, dynamic=True)
    counters.clear()
    for length, graphs in ((1024, 1), (700, 1), (1100, 2)):
        ids = _ids(length)
        expected = torch.autograd.grad(loss_fn(ids), list(model.parameters()))
        got = torch.autograd.grad(fn(ids), list(model.parameters()))
        assert counters["stats"]["unique_graphs"] == graphs
        for g, e in zip(got, expected, strict=True):
            assert (g - e).norm() <= 2e-5 * max(e.norm(), 1e-3)
        peak = measured_peak(lambda ids=ids: fn(ids).backward(), model) / MIB  # type: ignore[misc]
        assert peak <= float(budget.removesuffix("MiB"))
        if length != 700:
            assert predicted_mib() == pytest.approx(peak, rel=0.05, abs=0.5)
    plan = "\n".join(mstc.reports()[-1].plan)
    assert ("inside" in plan) == saves
    assert re.search(r"planned for s\d+ up to 1100: a longer one is planned anew", plan)


def test_a_count_that_is_no_length_stays_free() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    fn = _compiled(lambda x, count: (x @ weight).sum() * count, "8MiB", dynamic=True)
    counters.clear()
    for count in (3, 4, 5, 6):
        assert fn(torch.ones(9, 8), count).item() == pytest.approx(9 * weight.sum().item() * count, rel=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_sizes_that_only_a_run_tells_are_refused() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    fn = _compiled(lambda x, mask: (x[mask] @ weight).sum(), "8MiB")
    x, mask = torch.randn(9, 8), torch.arange(9) % 2 == 0
    assert fn(x, mask).item() == pytest.approx((x[mask] @ weight).sum().item(), rel=1e-5)
    (refusal,) = [r for r in mstc.reports()[-1].refusals if r.pass_name == "memory_budget"]
    assert refusal.reason.startswith("only a run tells how long it is")


def test_an_expert_without_tokens_stays_whole() -> None:
    """Split by counts that the program reads: an axis of length 0 beside one of all tokens."""
    weights = torch.randn(2, 16, 16, requires_grad=True)

    def experts(x: Tensor) -> Tensor:
        return torch.cat([(part @ w).tanh() @ w for part, w in zip(x.split([0, 512]), weights, strict=True)]).sum()

    x = torch.randn(512, 16)
    fn = _compiled(experts, "8MiB")
    assert fn(x).item() == pytest.approx(experts(x).item(), rel=1e-4)
    (expected,) = torch.autograd.grad(experts(x), weights)
    fn(x).backward()
    torch.testing.assert_close(weights.grad, expected)


def test_small_sizes_are_told_in_small_units() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    fn = torch.compile(lambda x: (x @ weight).sum(), backend="mstc", options={"lower": "eager", "memory_budget": 9})
    with pytest.raises(BackendCompilerFailed, match=r"is 9 B, but the smallest plan needs [1-9][\d.]* KiB"):
        fn(torch.ones(8, 8))


def test_an_impossible_budget_says_what_would_do() -> None:
    _, loss_fn = in_training("llama", **FOR_PEAKS)
    with pytest.raises(BackendCompilerFailed, match=r"smallest plan needs [\d.]+ MiB .*chunks brings") as found:
        _compiled(loss_fn, "1MiB")(_ids())
    needed = re.search(r"needs ([\d.]+) MiB", str(found.value))
    assert needed is not None
    just_below = int((float(needed[1]) - 0.05) * MIB) + 1  # rounds to what is needed
    with pytest.raises(BackendCompilerFailed, match=r"is [\d,]+ bytes, but the smallest plan needs [\d,]+ \("):
        _compiled(loss_fn, just_below)(_ids())
