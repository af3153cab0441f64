"""Buffers of loop bodies: used again when nobody refers to them, never while somebody does."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from mstc import compat
from mstc.ops.workspace import Workspace, empty_strided, workspace
from testkit.exactness import chunked, compare
from testkit.tiny import Tiny, inputs, step

ROW = 1024 * 64  # one row of the matrices below: 256 KiB in float32


def matrix(buffers: Workspace, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return buffers.empty_strided((rows, ROW), (ROW, 1), dtype)


def test_a_buffer_that_was_dropped_is_used_again() -> None:
    buffers = Workspace()
    first = matrix(buffers, 3)
    where = first.data_ptr()
    del first
    assert matrix(buffers, 3).data_ptr() == where


@pytest.mark.parametrize("keep", ["itself", "view", "list"])
def test_a_buffer_that_somebody_holds_is_left_alone(keep: str) -> None:
    buffers = Workspace()
    first = matrix(buffers, 3)
    held = {"itself": first, "view": first[1:].t(), "list": [first.view(-1)]}[keep]
    where = first.data_ptr()
    del first
    assert matrix(buffers, 3).data_ptr() != where
    assert held is not None


def test_shorter_and_other_dtypes_fit_but_nothing_much_larger_is_taken() -> None:
    """Chunks whose lengths differ by one share their buffers; a small buffer does not block a large one."""
    buffers = Workspace()
    where = matrix(buffers, 8).data_ptr()
    assert matrix(buffers, 7).data_ptr() == where
    assert matrix(buffers, 16, torch.bfloat16).data_ptr() == where
    assert matrix(buffers, 3).data_ptr() != where


def test_shape_stride_and_dtype() -> None:
    buffers = Workspace()
    del_me = matrix(buffers, 4)
    del del_me
    again = buffers.empty_strided((ROW, 4), (1, ROW), torch.float32)
    assert again.shape == (ROW, 4) and again.stride() == (1, ROW)
    assert buffers.empty_strided((0, 5), (5, 1), torch.float16).shape == (0, 5)
    assert buffers.empty_strided((), (), torch.int64).dtype == torch.int64


def test_outside_a_loop_nothing_is_kept() -> None:
    x = empty_strided((4, ROW), (ROW, 1), torch.float32)
    assert compat.references(x.untyped_storage()) == 2  # x, and the storage object just asked for
    with workspace():
        assert empty_strided((4, ROW), (ROW, 1), torch.float32).shape == (4, ROW)


def test_more_chunks_need_no_more_buffers_and_give_the_same_numbers() -> None:
    fresh: list[int] = []
    free = Workspace._free

    def counted(self: Workspace, size: int) -> torch.UntypedStorage | None:
        found = free(self, size)
        fresh.append(found is None)
        return found

    model = Tiny(dtype=torch.float32)
    made = []
    with mock.patch.object(Workspace, "_free", counted), mock.patch("mstc.ops.workspace._SMALLEST", 1):
        for count in (4, 8):
            fresh.clear()
            args = inputs(length=64 // 4 * count, dtype=torch.float32)
            compare(step(model), dict(model.named_parameters()), args, chunked(32, 32, "inductor")).check(torch.float32)
            made.append((len(fresh), sum(fresh)))
    (asked, new), (asked_twice, new_twice) = made
    assert asked_twice > asked > new > 0
    assert new_twice == new
