"""Buffers of loop bodies on the CPU, used again from chunk to chunk.

A body's temporaries are as large in every chunk. The C library gives large blocks back to the system when they
are freed, and each new page costs a fault: without reuse a third of a body's pointwise time went there. While a
loop runs, what its bodies allocate comes from its workspace; the workspace goes when the loop ends. A loop of one
chunk has none: what no later value fits into would only be kept. CUDA needs none of this: its allocator keeps what was
freed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence

import torch

from mstc import compat
from mstc.ops import pages

# Smaller blocks come from the heap of the C library, which does reuse them.
_SMALLEST = 64 * 1024


class Workspace:
    """Storages by size; one is free when nobody but the workspace refers to it."""

    def __init__(self) -> None:
        self._storages: list[torch.UntypedStorage] = []

    def empty_strided(self, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """As `torch.empty_strided` on the CPU, in a free storage of at most twice the size if there is one."""
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        size = 0 if 0 in shape else span * dtype.itemsize
        if size < _SMALLEST:
            return torch.empty_strided(shape, stride, dtype=dtype)
        storage = self._free(size)
        if storage is None:
            fresh = pages.empty_strided(shape, stride, dtype)
            self._storages.append(fresh.untyped_storage())
            return fresh
        return torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape), tuple(stride))

    def _free(self, size: int) -> torch.UntypedStorage | None:
        fitting = (s for s in self._storages if size <= s.nbytes() <= 2 * size and compat.references(s) == 1)
        return min(fitting, key=lambda s: s.nbytes(), default=None)


class _Active(threading.local):
    """The workspace of the loop that runs in this thread."""

    workspace: Workspace | None = None


_active = _Active()


@contextlib.contextmanager
def workspace(several: bool = True) -> Iterator[None]:
    """Let bodies that run meanwhile in this thread allocate from one workspace, where there are several to run."""
    outer, _active.workspace = _active.workspace, Workspace() if several else None
    try:
        yield
    finally:
        _active.workspace = outer


def empty_strided(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What compiled code calls for a CPU buffer; outside a loop it comes from the system."""
    if _active.workspace is None:
        return pages.empty_strided(shape, stride, dtype)
    return _active.workspace.empty_strided(shape, stride, dtype)
