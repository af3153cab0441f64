"""Predicted against measured peaks on a GPU: models x lengths x budgets, by the caching allocator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mstc
from testkit.allocator import predicted_mib
from testkit.hf_models import in_training

pytestmark = pytest.mark.gpu

MIB = 2**20
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1792,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 1 << 16,
}


@pytest.mark.parametrize("budget", ["350MiB", "600MiB", "1200MiB"])
@pytest.mark.parametrize("length", [8192, 16384])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "phi3", "olmo2"])
def test_the_predicted_peak_is_measured(kind: str, length: int, budget: str) -> None:
    model, loss_fn = in_training(kind, **SIZES)
    model.to("cuda", torch.bfloat16)
    ids = torch.randint(0, 8192, (1, length), device="cuda")
    torch._dynamo.reset()
    mstc.clear_reports()
    options: dict[str, Any] = {"memory_budget": {"total": budget, "outside": 0}}
    fn = torch.compile(loss_fn, backend="mstc", options=options, dynamic=False)
    for _ in range(2):
        fn(ids).backward()
        model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated() - sum(p.numel() * p.element_size() for p in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    fn(ids).backward()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    predicted = predicted_mib()
    print(f"\n| {kind} | {length} | {budget} | {predicted:.0f} | {peak:.0f} | {predicted / peak:.3f} |")
    assert predicted == pytest.approx(peak, rel=0.05)
