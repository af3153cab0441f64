"""A memory budget: the plan is met, the numbers stay, impossible budgets say what would do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import mstc
from testkit.allocator import measured_peak
from testkit.hf_models import config_of

MIB = 2**20
_SIZES = {"hidden_size": 64, "intermediate_size": 224, "vocab_size": 512, "max_position_embeddings": 4096}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _model() -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of("llama", **{**_BASE, **_SIZES})).train()


_BASE: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _ids(length: int = 1024) -> Tensor:
    return torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(0))


def _loss_fn(model: Any) -> Any:
    def loss_fn(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    return loss_fn


def _compiled(model: Any, budget: object) -> Any:
    return torch.compile(
        _loss_fn(model), backend="mstc", options={"lower": "aot_eager", "memory_budget": budget}, dynamic=False
    )


def _predicted() -> float:
    line = next(line for line in mstc.reports()[-1].plan if "predicted peak" in line)
    return float(line.split("predicted peak ")[1].split(" MiB")[0])


def test_the_measured_peak_is_the_predicted_one_and_the_gradients_are_eagers() -> None:
    model, ids = _model(), _ids()
    expected = _loss_fn(model)(ids)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    fn = _compiled(model, "8MiB")
    model.zero_grad()
    loss = fn(ids)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad - gradient).norm() <= 2e-5 * max(gradient.norm(), 1e-3)
    peak = measured_peak(lambda: fn(ids).backward(), model) / MIB
    assert peak <= 8
    assert _predicted() == pytest.approx(peak, rel=0.05, abs=0.5)


def test_an_impossible_budget_says_what_would_do() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"smallest plan needs \d+ MiB .*chunks brings"):
        _compiled(_model(), "1MiB")(_ids())
