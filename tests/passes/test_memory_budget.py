"""A memory budget: the plan is met, the numbers stay, impossible budgets say what would do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from testkit.allocator import measured_peak, predicted_mib
from testkit.hf_models import FOR_PEAKS, in_training

MIB = 2**20


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _ids(length: int = 1024) -> Tensor:
    return torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(0))


def _compiled(loss_fn: Any, budget: object) -> Any:
    options: dict[str, Any] = {"lower": "aot_eager", "memory_budget": budget}
    return torch.compile(loss_fn, backend="mstc", options=options, dynamic=False)


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


def test_small_sizes_are_told_in_small_units() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    fn = torch.compile(lambda x: (x @ weight).sum(), backend="mstc", options={"lower": "eager", "memory_budget": 9})
    with pytest.raises(BackendCompilerFailed, match=r"is 9 B, but the smallest plan needs [1-9][\d.]* KiB"):
        fn(torch.ones(8, 8))


def test_an_impossible_budget_says_what_would_do() -> None:
    _, loss_fn = in_training("llama", **FOR_PEAKS)
    with pytest.raises(BackendCompilerFailed, match=r"smallest plan needs [\d.]+ MiB .*chunks brings"):
        _compiled(loss_fn, "1MiB")(_ids())
