"""Biases and scales of norms in half precision: summed over all chunks, rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

from mstc.ops.wide_sums import widened
from testkit.capture import normal_graph
from testkit.exactness import chunked, gradients_of

aten = torch.ops.aten
ROWS = 512


class Scale(nn.Module):
    """x W^T s + b with the gradient one for each of it: b has ``ROWS`` as its gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down = (nn.Linear(4, 4, dtype=dtype) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(4, dtype=dtype))

    def forward(self, x: Tensor, dy: Tensor) -> Tensor:
        return (self.down(torch.tanh(self.up(x))) * self.scale * dy).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_chunk", [8, 100, 257])
def test_sums_are_rounded_once(dtype: torch.dtype, per_chunk: int) -> None:
    """Of random numbers rounded to the dtype, in any chunks: the exact sum, rounded."""
    model = Scale(dtype)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(1, ROWS, 4, generator=generator).to(dtype) for _ in range(2))
    torch._dynamo.reset()
    fast = torch.compile(model, backend="mstc", options=chunked(per_chunk, per_chunk, "eager"))
    _, got = gradients_of(fast, {"bias": model.down.bias}, (x, dy))
    assert got["bias"] is not None
    exact = dy.double().sum((0, 1))
    assert torch.equal(got["bias"], exact.to(dtype))


def wide(fn: Any, *inputs: Tensor) -> tuple[fx.Node, fx.Node]:
    """The result of the function, and what stands for it."""
    graph = normal_graph(fn, *inputs)
    result = graph.output_node().args[0][0]  # type: ignore[index]
    assert isinstance(result, fx.Node)
    found = widened(result)
    graph.lint()
    return result, found


def test_a_sum_seen_through_views_keeps_its_shape() -> None:
    result, found = wide(lambda x: x.sum((0, 1), keepdim=True).view(1, 4).reshape(2, 2), torch.ones(3, 5, 4).bfloat16())
    assert found is not result and found.meta["val"].dtype is torch.float32
    assert found.meta["val"].shape == result.meta["val"].shape == (2, 2)


@pytest.mark.parametrize(
    ("fn", "dtype"),
    [
        (lambda x: x.sum((0, 1)), torch.float32),
        (lambda x: x.sum((0, 1)), torch.float64),
        (lambda x: x.sum((0, 1)) * 2, torch.bfloat16),
        (lambda x: x.cumsum(1), torch.bfloat16),
    ],
    ids=["float32", "float64", "more than a sum", "no sum"],
)
def test_anything_else_stays(fn: Any, dtype: torch.dtype) -> None:
    result, found = wide(fn, torch.ones(3, 5, 4, dtype=dtype))
    assert found is result
