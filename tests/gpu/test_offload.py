"""Offloading on a GPU: pinned memory, copies beside computation, values fetched ahead; gradients equal bit by bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import mstc
import mstc.lower
from testkit.hf_models import config_of

pytestmark = pytest.mark.gpu


def _gradients(loss_fn: Callable[[Tensor], Tensor], model: Any, ids: Tensor, budget: str) -> tuple[list[Tensor], int]:
    """Of the third step, and the peak."""
    torch._dynamo.reset()
    options = {"memory_budget": budget, "recompute": {"offload": True}}
    fn = torch.compile(loss_fn, backend="mstc", options=options, dynamic=False)
    for _ in range(3):
        model.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        fn(ids).backward()
        torch.cuda.synchronize()
    return [p.grad.clone() for p in model.parameters()], torch.cuda.max_memory_allocated()


def test_gradients_are_bit_equal_and_the_peak_is_lower() -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1792, "num_hidden_layers": 12, "num_attention_heads": 8}
    more = {"num_key_value_heads": 2, "vocab_size": 1024, "use_cache": False, "max_position_embeddings": 1 << 15}
    model: Any = AutoModelForCausalLM.from_config(config_of("llama", **sizes, **more)).bfloat16().cuda().train()
    ids = torch.randint(0, 1024, (1, 16384), device="cuda")

    def loss_fn(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    budget = "400MiB"
    away, low = _gradients(loss_fn, model, ids, budget)
    assert any("wait for the backward elsewhere" in line for line in mstc.reports()[-1].plan)
    with mock.patch.object(mstc.lower, "tags_of", return_value=""):
        kept, high = _gradients(loss_fn, model, ids, budget)
    assert all(torch.equal(a, b) for a, b in zip(away, kept, strict=True))
    assert low < high
