"""Weights' gradients are summed in float32; on a GPU half precision is multiplied as it is."""

from __future__ import annotations

import pytest
import torch

from mstc import compat
from mstc.ops.accumulate import _multiplied_as_they_are

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("device", "left", "right", "total", "as_they_are"),
    [
        ("cuda", BF16, BF16, F32, True),
        ("cuda", F16, F16, F32, True),
        ("cuda", BF16, F32, F32, False),
        ("cuda", BF16, BF16, BF16, False),
        ("cuda", F32, F32, F32, False),
        ("cpu", BF16, BF16, F32, False),
    ],
)
def test_what_is_multiplied_as_it_is(
    device: str, left: torch.dtype, right: torch.dtype, total: torch.dtype, as_they_are: bool
) -> None:
    with compat.FakeTensorMode():
        x, dy = torch.empty(4, 3, device=device, dtype=left), torch.empty(3, 5, device=device, dtype=right)
        assert _multiplied_as_they_are(x, dy, total) == as_they_are
