"""The gradient of a table against ATen's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mstc.ops.table  # noqa: F401  # defines the op
from testkit.allocator import measured_peak

BOUNDS = {torch.float64: 1e-14, torch.float32: 2e-6}


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (5, 9), (2, 3, 4), (0,)], ids=str)
@pytest.mark.parametrize("width", [1, 4])
def test_as_aten(shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(0, 5, shape, generator=generator)
    grad = torch.randn(*shape, width, dtype=dtype, generator=generator)
    found = torch.ops.mstc.table_gradient(grad, index, 6)
    expected = torch.ops.aten.embedding_dense_backward(grad, index, 6, -1, False)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=BOUNDS[dtype], atol=BOUNDS[dtype])


def test_a_gradient_in_another_order_is_not_copied_whole() -> None:
    """[batch, heads, queries, keys] by which pairs have which bias."""
    index = torch.randint(0, 5, (2, 64, 48))
    grad = torch.randn(2, 3, 64, 48, dtype=torch.float64).permute(0, 2, 3, 1)
    found = torch.ops.mstc.table_gradient(grad, index, 6)
    torch.testing.assert_close(found, torch.ops.aten.embedding_dense_backward(grad, index, 6, -1, False))
    peak = measured_peak(lambda: torch.ops.mstc.table_gradient(grad, index, 6), nn.Module())
    assert peak < grad.nbytes / 8


def test_opcheck() -> None:
    index, grad = torch.randint(0, 5, (3, 4)), torch.randn(3, 4, 2)
    torch.library.opcheck(torch.ops.mstc.table_gradient.default, (grad, index, 6))
