"""Triangles as comparisons of positions: bit for bit the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from testkit.exactness import compare

SHAPES = [(5, 5), (3, 4, 7), (7, 4)]


@pytest.mark.parametrize("diagonal", [-9, -2, 0, 1, 9])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("triangle", [torch.tril, torch.triu], ids=lambda f: f.__name__)
def test_values_and_gradients(triangle: Any, shape: tuple[int, ...], diagonal: int) -> None:
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        flags = triangle(torch.ones(shape, dtype=torch.bool), diagonal)
        return (triangle(x, diagonal).exp() + triangle(torch.full(shape, 2.0), diagonal) + flags.double()).sum()

    result = compare(loss, {"x": x}, [x], {"lower": "eager"})
    assert result.loss == 0 and result.worst == 0
    targets = {str(n.target) for n in result.graphs[0].graph.nodes}
    assert not targets & {"aten.tril.default", "aten.triu.default"}


def test_infinite_values_are_dropped_not_multiplied() -> None:
    def mask(x: Tensor) -> Tensor:
        return x + torch.triu(torch.full((4, 4), float("-inf")), diagonal=1)

    torch._dynamo.reset()
    x = torch.zeros(4, 4)
    assert torch.equal(torch.compile(mask, backend="mstc", options={"lower": "eager"})(x), mask(x))


def test_flags_stay_flags() -> None:
    def fill(x: Tensor) -> Tensor:
        return x.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), float("-inf"))

    torch._dynamo.reset()
    x = torch.randn(4, 4)
    assert torch.equal(torch.compile(fill, backend="mstc", options={"lower": "eager"})(x), fill(x))
