"""The blocks and segments of PyTorch's caching allocator."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mstc.cli.plan.blocks import MIB, Allocator, OutOfMemoryError, fits


@pytest.mark.parametrize(
    ("nbytes", "reserved"),
    [(1, 2), (MIB, 2), (MIB + 1, 20), (9 * MIB, 20), (10 * MIB, 10), (11 * MIB, 12)],
)
def test_segments_come_in_sizes(nbytes: int, reserved: int) -> None:
    """The first request of a kind; sizes as PyTorch's notes on CUDA memory have them."""
    allocator = Allocator(1 << 30)
    allocator.take(nbytes)
    assert allocator.reserved == reserved * MIB


def test_what_is_left_of_a_segment_is_handed_out() -> None:
    allocator = Allocator(1 << 30)
    for _ in range(4):
        allocator.take(5 * MIB)
    assert allocator.reserved == 20 * MIB


def test_neighbours_join() -> None:
    """Two free blocks of one segment serve what neither of them could; of two segments they cannot."""
    allocator = Allocator(1 << 30)
    whole = allocator.take(40 * MIB)
    allocator.give(whole)
    first, second, third = (allocator.take(size * MIB) for size in (12, 12, 16))
    assert allocator.reserved == 40 * MIB
    allocator.give(first)
    allocator.give(second)
    allocator.take(24 * MIB)
    assert allocator.reserved == 40 * MIB
    allocator.give(third)
    apart = [allocator.take(12 * MIB), allocator.take(12 * MIB)]
    for block in apart:
        allocator.give(block)
    before = allocator.reserved
    allocator.take(24 * MIB)
    assert allocator.reserved == before + 24 * MIB


def test_unused_segments_go_back_before_memory_is_out() -> None:
    allocator = Allocator(40 * MIB)
    allocator.give(allocator.take(30 * MIB))
    held = allocator.take(35 * MIB)
    assert allocator.reserved == 36 * MIB
    with pytest.raises(OutOfMemoryError):
        allocator.take(10 * MIB)
    allocator.give(held)
    allocator.take(40 * MIB)


def test_a_schedule_needs_more_than_what_is_live() -> None:
    """A hole below a block that stays serves no larger request."""
    events = [(0, 30 * MIB), (0, 0), (1, 12 * MIB), (2, 24 * MIB)]
    assert not fits(events, 36 * MIB)
    assert fits(events, 54 * MIB)


@given(st.lists(st.tuples(st.integers(1, 64 * MIB), st.integers(0, 9))))
def test_bytes_are_neither_lost_nor_handed_out_twice(steps: list[tuple[int, int]]) -> None:
    """Blocks in use do not overlap and lie within what is reserved; once all is free, all of it can go back."""
    allocator = Allocator(1 << 40)
    taken = []
    for nbytes, which in steps:
        if which < 6 or not taken:
            block = allocator.take(nbytes)
            assert block.size >= nbytes
            taken.append(block)
        else:
            allocator.give(taken.pop(which % len(taken)))
        ends = sorted((b.segment, b.offset, b.offset + b.size) for b in taken)
        assert all(a[0] != b[0] or a[2] <= b[1] for a, b in pairwise(ends))
        assert sum(b.size for b in taken) <= allocator.reserved
    for block in taken:
        allocator.give(block)
    allocator.capacity = max(allocator.reserved, 20 * MIB)
    allocator.take(allocator.capacity)
