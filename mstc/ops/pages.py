"""Large tensors of the CPU on huge pages.

The C library asks the system for every large block anew, and each page of 4 KiB that is touched for the first time
costs a fault: about 2 us on a virtual machine, 8 ms for 16 MiB, as long as a matrix product takes to fill them.
Linux gives a range that asks for them (``madvise``) pages of 2 MiB, unless its administrator said "never". Elsewhere
nothing changes.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence

import torch

# Blocks below hold too few whole huge pages, whose addresses are multiples of their size.
SMALLEST = 8 * 2**20

_HUGE_PAGES: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only


def _madvise() -> Callable[[int, int, int], int] | None:
    """Of the C library, where it takes this advice."""
    if _HUGE_PAGES is None:
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return function


_advise = _madvise()


def on_huge_pages(x: torch.Tensor) -> torch.Tensor:
    """``x``, which nothing has been written to; its values and its memory stay where they are."""
    if _advise is None or type(x) is not torch.Tensor or x.nbytes < SMALLEST or x.device.type != "cpu":
        return x
    storage = x.untyped_storage()
    first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    # A system without huge pages refuses, which leaves the pages as they are.
    _advise(first, storage.data_ptr() + storage.nbytes() - first, _HUGE_PAGES)  # type: ignore[arg-type]
    return x


def empty_strided(
    shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """As `torch.empty_strided`."""
    return on_huge_pages(torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=device))
