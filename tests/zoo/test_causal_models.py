"""Hugging Face causal models, unpatched: loss and every gradient, and every layer's products in loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from testkit.exactness import Comparison, chunked, compare, products_outside
from testkit.float64 import true_float64
from testkit.hf_models import CAUSAL, causal, tokens


def loss_of(model: nn.Module) -> Any:
    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    return loss


def compared(model: nn.Module, options: dict[str, Any] | None = None) -> Comparison:
    with true_float64():
        return compare(loss_of(model), dict(model.named_parameters()), (tokens(),), options)


@pytest.mark.parametrize("kind", CAUSAL)
def test_exact_and_in_loops(kind: str) -> None:
    result = compared(causal(kind))
    print(result.describe())
    result.check()
    assert len(result.graphs) == 1, "the model compiles as one graph"
    assert not products_outside(result.graphs[0])
    # q/k/v of each layer, what follows its attention, and the head.
    assert result.loops >= 5
    assert not [r for report in result.reports for r in report.refusals if r.pass_name != "masks"]
