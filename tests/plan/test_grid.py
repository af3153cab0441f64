"""Predicted against measured peaks on models x lengths x budgets, by the allocator's events on the CPU.

A small part runs in CI; the rest is slow, and its table stands in docs/benchmarks.md.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from testkit.budgets import peaks_at
from testkit.hf_models import FOR_PEAKS, in_training
from testkit.shares import first_of

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


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("kind", "length", "share"), POINTS)
@pytest.mark.parametrize("lower", first_of(LOWERS, ["inductor"]))
def test_the_predicted_peak_is_measured(lower: str, kind: str, length: int, share: float) -> None:
    model, loss_fn = in_training(kind, **FOR_PEAKS)
    ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(0))
    predicted, peak = peaks_at(share, loss_fn, ids, model, lower, f"{kind} | {length}")
    assert predicted == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("length", [1024, *(pytest.param(n, marks=pytest.mark.slow) for n in (2048, 4096))])
@pytest.mark.parametrize("told", ["attention_mask", "position_ids"])
def test_the_peak_of_padded_and_packed_batches(told: str, length: int) -> None:
    """Of the least plan, whose attention is what holds most."""
    model, _ = in_training("llama", **FOR_PEAKS)
    ids = torch.randint(0, 512, (2, length), generator=torch.Generator().manual_seed(0))
    at = torch.arange(length).expand(2, length)
    given = {told: (at < length - 300).long() if told == "attention_mask" else (at % 700).contiguous()}

    def loss_fn(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids, **given).loss
        return loss

    predicted, peak = peaks_at(0.0, loss_fn, ids, model, "aot_eager", f"{told} | {length}")
    assert predicted == pytest.approx(peak, rel=0.02)
