"""Pieces lie in memory exactly as the bodies were traced for."""

from __future__ import annotations

import pytest
import torch

from mstc.ops.pieces import dense, dense_strides


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 3, 4)[::2],
        torch.zeros(1, 3, 4).expand(5, 3, 4)[:1],
        torch.zeros(3, 1, 4).as_strided((3, 1, 4), (4, 1, 1)),
    ],
    ids=["every second", "expanded", "any stride"],
)
def test_dimensions_of_size_one_have_the_strides_of_the_trace_without_a_copy(x: torch.Tensor) -> None:
    found = dense(x, (0, 1, 2))
    assert found.stride() == dense_strides(x.shape, (0, 1, 2))
    assert found.data_ptr() == x.data_ptr() and torch.equal(found, x)


def test_another_layout_is_copied() -> None:
    x = torch.arange(24.0).view(2, 3, 4)
    found = dense(x, (0, 2, 1))
    assert found.stride() == (12, 1, 3) and torch.equal(found, x)
    assert dense(x, (0, 1, 2)) is x
