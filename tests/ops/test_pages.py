"""Large tensors of the CPU ask for huge pages; nothing else about them changes."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mstc.ops import pages
from mstc.ops.pages import SMALLEST, empty_strided, on_huge_pages
from mstc.ops.pieces import dense, empty
from mstc.ops.workspace import workspace
from testkit.exactness import chunked, compare
from testkit.tiny import Tiny, inputs, step

ROWS, COLUMNS = SMALLEST // 4096, 1024  # float32: the least that asks


def advice(function: object = None) -> mock._patch[mock.Mock]:
    return mock.patch.object(pages, "_advise", mock.Mock(return_value=0) if function is None else function)


def test_a_tensor_is_as_torch_makes_it() -> None:
    made = empty_strided((COLUMNS, ROWS), (1, COLUMNS), torch.float32)
    like = torch.empty_strided((COLUMNS, ROWS), (1, COLUMNS))
    assert (made.shape, made.stride(), made.dtype, made.device) == (like.shape, like.stride(), like.dtype, like.device)
    assert made.untyped_storage().nbytes() == like.untyped_storage().nbytes()


def test_what_is_asked_for_lies_in_the_tensor() -> None:
    with advice() as asked:
        x = empty_strided((ROWS, COLUMNS), (COLUMNS, 1), torch.float32)
    (first, length, kind), _ = asked.call_args
    assert asked.call_count == 1 and kind == getattr(mmap, "MADV_HUGEPAGE", None)
    assert first % mmap.PAGESIZE == 0 and 0 <= first - x.data_ptr() < mmap.PAGESIZE
    assert first + length == x.data_ptr() + x.nbytes


def test_small_tensors_other_devices_and_fakes_ask_for_nothing() -> None:
    with advice() as asked:
        empty_strided((ROWS - 1, COLUMNS), (COLUMNS, 1), torch.float32)
        empty_strided((0, COLUMNS), (COLUMNS, 1), torch.float32)
        empty_strided((ROWS, COLUMNS), (COLUMNS, 1), torch.float32, "meta")
        with FakeTensorMode():
            empty_strided((ROWS, COLUMNS), (COLUMNS, 1), torch.float32)
        assert not asked.called


def test_a_system_without_huge_pages_changes_nothing() -> None:
    with advice(mock.Mock(return_value=-1)):  # as where the kernel was built without them
        assert torch.equal(on_huge_pages(torch.zeros(ROWS, COLUMNS)), torch.zeros(ROWS, COLUMNS))
    with mock.patch.object(pages, "_advise", None):  # as on other systems than Linux
        assert empty_strided((ROWS, COLUMNS), (COLUMNS, 1), torch.float32).shape == (ROWS, COLUMNS)


@pytest.mark.parametrize("maker", ["outputs", "copies", "bodies", "graphs"])
def test_what_loops_and_compiled_code_allocate_asks(maker: str) -> None:
    from mstc.ops.workspace import empty_strided as compiled

    x = torch.zeros(ROWS, COLUMNS)
    with advice() as asked:
        if maker == "outputs":
            empty((ROWS, COLUMNS), (0, 1), x.dtype, x.device)
        elif maker == "copies":
            assert dense(x.t(), (0, 1)).is_contiguous()
        elif maker == "graphs":
            compiled((ROWS, COLUMNS), (COLUMNS, 1), x.dtype)
        else:
            with workspace():
                compiled((ROWS, COLUMNS), (COLUMNS, 1), x.dtype)
        assert asked.call_count == 1


def test_code_of_whole_graphs_allocates_so() -> None:
    """Forward and backward: what Inductor compiles outside of loops, too."""
    torch._dynamo.reset()
    function = torch.compile(
        lambda x: (x.sin().cumsum(0) + 1).cumsum(1).sum(), backend="mstc", options={"mini_sequence": False}
    )
    x = torch.randn(ROWS, COLUMNS, requires_grad=True)
    with advice() as asked:
        loss = function(x)
        forward = asked.call_count
        loss.backward()
        assert forward and asked.call_count > forward


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes this advice")
def test_the_system_is_asked() -> None:
    x = empty_strided((8 * ROWS, COLUMNS), (COLUMNS, 1), torch.float32)
    middle = x.data_ptr() + x.nbytes // 2
    flags = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            first, last = (int(part, 16) for part in head.split("-"))
            inside = first <= middle < last
        elif head == "VmFlags:" and inside:
            flags = line.split()[1:]
    assert flags is not None
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this kernel has no huge pages to ask for")
    assert "hg" in flags


def test_a_step_is_exact_on_huge_pages() -> None:
    model = Tiny()
    with mock.patch.object(pages, "SMALLEST", 1):
        compare(step(model), dict(model.named_parameters()), inputs(length=64), chunked(32, 32)).check(torch.float64)
