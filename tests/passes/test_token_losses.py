"""Losses over tokens as sums: classes in dimension 1 become rows of classes where they lie in memory so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from testkit.exactness import compare, loops_of

aten = torch.ops.aten
OPTIONS = {"lower": "eager", "lm_head": {"chunk_tokens": 4}}
LOSSES: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum, one class ignored": {"reduction": "sum", "ignore_index": 2},
    "class weights": {"weight": torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))},
    "label smoothing": {"label_smoothing": 0.1},
}


def _head() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(6, 5, dtype=torch.float64)
    return head, torch.randn(2, 9, 6, dtype=torch.float64), torch.randint(0, 5, (2, 9))


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_classes_in_dimension_1_behind_a_head(options: dict[str, Any]) -> None:
    head, x, target = _head()

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(x).transpose(1, 2), target, **options)

    result = compare(loss, {**dict(head.named_parameters()), "x": x.requires_grad_()}, [x, target], OPTIONS)
    result.check()
    assert loops_of(result.graphs[0]), result.describe()


def test_class_probabilities_in_dimension_1() -> None:
    head, x, _ = _head()
    target = torch.rand(2, 5, 9, dtype=torch.float64).softmax(1)

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(head(x).transpose(1, 2), target)

    compare(loss, {**dict(head.named_parameters()), "x": x.requires_grad_()}, [x, target], OPTIONS).check()


def test_pictures_whose_classes_lie_first_are_not_copied() -> None:
    torch.manual_seed(0)
    scores, target = torch.randn(2, 5, 4, 4, dtype=torch.float64).requires_grad_(), torch.randint(0, 5, (2, 4, 4))

    def loss(scores: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(scores.tanh(), target)

    result = compare(loss, {"scores": scores}, [scores, target], {"lower": "eager", "lm_head": False})
    result.check()
    assert not result.graphs[0].graph.find_nodes(op="call_function", target=aten.permute.default)
