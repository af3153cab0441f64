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
ROWS, WIDTH = 512, 64


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


class Norm(nn.Module):
    """A norm of x: the layer before it adds nothing."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.up, self.norm = nn.Linear(WIDTH, WIDTH), norm
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, dy: Tensor) -> Tensor:
        return (self.norm(x + torch.tanh(self.up(x))) * dy).sum()


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_scales_of_norms_are_rounded_once(norm: Any) -> None:
    """Of rows of ones and minus ones, which a norm leaves as they are but for its epsilon."""
    model = Norm(norm(WIDTH, eps=1e-9)).bfloat16()
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(ROWS, WIDTH, generator=generator).argsort(-1)
    x = torch.where(order < WIDTH // 2, 1.0, -1.0)[None].bfloat16()
    dy = torch.randn(1, ROWS, WIDTH, generator=generator).bfloat16()
    torch._dynamo.reset()
    fast = torch.compile(model, backend="mstc", options=chunked(2, 2, "eager"))
    _, got = gradients_of(fast, dict(model.norm.named_parameters()), (x, dy))
    exact = {"weight": (dy.double() * x.double()).sum((0, 1)), "bias": dy.double().sum((0, 1))}
    for name, value in got.items():
        assert value is not None and value.dtype is torch.bfloat16
        half_a_step = 2.0**-8 * exact[name].abs()
        assert ((value.double() - exact[name]).abs() <= 1.001 * half_a_step).all(), name


def wide(fn: Any, *inputs: Tensor) -> tuple[fx.Node, fx.Node]:
    """The result of the function, and what stands for it."""
    graph = normal_graph(fn, *inputs)
    result = graph.output_node().args[0][0]  # type: ignore[index]
    assert isinstance(result, fx.Node)
    found = widened(result)
    graph.lint()
    return result, found


@pytest.mark.parametrize("before", [lambda x: x, lambda x: x.float()], ids=["summed", "summed and rounded"])
def test_a_sum_seen_through_views_keeps_its_shape(before: Any) -> None:
    def fn(x: Tensor) -> Tensor:
        return before(x).sum((0, 1), keepdim=True).to(torch.bfloat16).view(1, 4).reshape(2, 2)

    result, found = wide(fn, torch.ones(3, 5, 4).bfloat16())
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
