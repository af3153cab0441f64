"""What PyTorch's caching allocator makes of a schedule: bytes lie in blocks, blocks in segments of the device.

A request takes the smallest free block that holds it, which is split where more than a little is left. A segment goes
back to the device when all of it is free and the device has nothing else to give. So what is reserved exceeds what is
live, the more the oftener sizes change. Rules and sizes are the defaults of `c10::cuda::CUDACachingAllocator`, without
``expandable_segments`` (https://docs.pytorch.org/docs/stable/notes/cuda.html#memory-management).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field

MIB = 1 << 20
ROUND = 512  # blocks are multiples of it
SMALL = MIB  # requests up to it have segments of their own kind, of `SMALL_SEGMENT`
SMALL_SEGMENT = 2 * MIB
MIDDLE = 10 * MIB  # larger requests below it come from segments of `MIDDLE_SEGMENT`
MIDDLE_SEGMENT = 20 * MIB
LARGE_ROUND = 2 * MIB  # segments of all others are multiples of it


@dataclass(eq=False)
class Block:
    """``size`` bytes at ``offset`` of a segment, between the blocks ``before`` and ``after``."""

    small: bool
    segment: int
    offset: int
    size: int
    free: bool = True
    before: Block | None = field(default=None, repr=False)
    after: Block | None = field(default=None, repr=False)

    @property
    def key(self) -> tuple[int, int, int]:
        """The order in which free blocks are taken."""
        return self.size, self.segment, self.offset


class OutOfMemoryError(Exception):
    """The device has no room, not even with everything unused given back."""


class Allocator:
    """Of a device with ``capacity`` bytes; ``reserved``: bytes of all segments, now."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.reserved = 0
        self._segments = 0
        self._free: dict[bool, list[Block]] = {True: [], False: []}

    def take(self, nbytes: int) -> Block:
        """A block for ``nbytes``. Raises `OutOfMemoryError`."""
        size = _rounded(max(nbytes, 1), ROUND)
        small = size <= SMALL
        free = self._free[small]
        at = bisect_left(free, (size, 0, 0), key=_key)
        block = free.pop(at) if at < len(free) else self._segment(size, small)
        left = block.size - size
        if left >= ROUND if small else left > SMALL:
            rest = Block(small, block.segment, block.offset + size, left, before=block, after=block.after)
            if block.after is not None:
                block.after.before = rest
            block.size, block.after = size, rest
            insort(free, rest, key=_key)
        block.free = False
        return block

    def give(self, block: Block) -> None:
        """Free a block, and join it with free neighbours."""
        if block.before is not None and block.before.free:
            block = self._joined(block.before, block)
        if block.after is not None and block.after.free:
            block = self._joined(block, block.after)
        block.free = True
        insort(self._free[block.small], block, key=_key)

    def _joined(self, left: Block, right: Block) -> Block:
        """One block of two neighbours, those of them that are free taken from the free ones."""
        for block in (left, right):
            if block.free:
                free = self._free[block.small]
                del free[bisect_left(free, block.key, key=_key)]
                block.free = False
        left.size += right.size
        left.after = right.after
        if left.after is not None:
            left.after.before = left
        return left

    def _segment(self, size: int, small: bool) -> Block:
        """A new segment, as one block."""
        if small:
            size = SMALL_SEGMENT
        else:
            size = MIDDLE_SEGMENT if size < MIDDLE else _rounded(size, LARGE_ROUND)
        if self.reserved + size > self.capacity:
            self._give_back()
        if self.reserved + size > self.capacity:
            raise OutOfMemoryError
        self.reserved += size
        self._segments += 1
        return Block(small, self._segments, 0, size)

    def _give_back(self) -> None:
        """Every segment of which nothing is used returns to the device."""
        for small, blocks in self._free.items():
            self._free[small] = [b for b in blocks if b.before is not None or b.after is not None]
            self.reserved -= sum(b.size for b in blocks) - sum(b.size for b in self._free[small])


def fits(events: Sequence[tuple[int, int]], capacity: int) -> bool:
    """Whether a step has room, and another after it, which begins with what the first left in the cache.

    events: (name, bytes) where that much is made, (name, 0) where it is freed; what is left ends with the step.
    """
    allocator = Allocator(capacity)
    try:
        for _ in range(2):
            taken: dict[int, Block] = {}
            for name, nbytes in events:
                if nbytes:
                    taken[name] = allocator.take(nbytes)
                else:
                    allocator.give(taken.pop(name))
            for block in taken.values():
                allocator.give(block)
    except OutOfMemoryError:
        return False
    return True


def _key(block: Block) -> tuple[int, int, int]:
    return block.key


def _rounded(size: int, grain: int) -> int:
    return -(-size // grain) * grain
