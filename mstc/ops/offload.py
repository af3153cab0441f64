"""``mstc::offload`` and ``mstc::fetch``: a saved value waits for its backward outside of the device's memory.

    handle = offload(x, strides)              bytes: x as it lies in memory, elsewhere
    x = fetch(handle, upcoming, sizes, strides, dtype, device)

Exact: bytes come back as they went. A handle is a tensor of bytes on the host, so that autograd holds and frees it
like any other saved value. From a CUDA device it lies in pinned memory: copies run on a stream of their own, and a
fetch starts those of ``upcoming``, the handles that the backward reads next. From a CPU it is a temporary file that
was unlinked at once, mapped into memory; its pages are given up when they were read, so they are no part of the
process. MSTC_OFFLOAD_DIR says where files lie (else the system's temporary folder, which must not be in memory).
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile
import threading
import weakref
from collections.abc import Sequence

import torch

torch.library.define("mstc::offload", "(Tensor x, SymInt[] strides) -> Tensor")
torch.library.define(
    "mstc::fetch",
    "(Tensor handle, Tensor[] upcoming, SymInt[] sizes, SymInt[] strides, ScalarType dtype, Device device) -> Tensor",
)


def _bytes_of(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor in the order in which they lie, as a view."""
    flat = torch.empty(0, dtype=torch.uint8, device=x.device)
    return flat.set_(x.untyped_storage(), x.storage_offset() * x.element_size(), (x.numel() * x.element_size(),), (1,))


def _laid_out(x: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    """``x`` with these strides, which leave no gaps; a compiler may have chosen others."""
    if all(a == b for a, b, n in zip(x.stride(), strides, x.shape, strict=True) if n != 1):
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _offload_fake(x: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    return x.new_empty((x.numel() * x.element_size(),), dtype=torch.uint8, device="cpu")


def _fetch_fake(
    handle: torch.Tensor,
    upcoming: Sequence[torch.Tensor],
    sizes: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    return torch.empty_strided(sizes, strides, dtype=dtype, device=device)


torch.library.register_fake("mstc::offload", _offload_fake)
torch.library.register_fake("mstc::fetch", _fetch_fake)


# -- files, for values on the CPU ----------------------------------------------------------------

_files: weakref.WeakValueDictionary[int, mmap.mmap] = weakref.WeakValueDictionary()  # by the address of the mapping


def _to_file(x: torch.Tensor) -> torch.Tensor:
    """A handle whose bytes lie in a file; the file goes with the handle."""
    size = x.numel() * x.element_size()
    with tempfile.TemporaryFile(dir=os.environ.get("MSTC_OFFLOAD_DIR")) as file:
        file.truncate(size)
        left = memoryview((ctypes.c_char * size).from_address(x.data_ptr()))
        while left:
            left = left[os.write(file.fileno(), left) :]
        mapped = mmap.mmap(file.fileno(), size)
    handle = torch.frombuffer(mapped, dtype=torch.uint8)
    _files[handle.data_ptr()] = mapped
    return handle


def _from_file(handle: torch.Tensor, into: torch.Tensor) -> None:
    _bytes_of(into).copy_(handle)
    mapped = _files.get(handle.data_ptr())
    if mapped is not None:
        mapped.madvise(mmap.MADV_DONTNEED)


# -- pinned memory, for values on a CUDA device --------------------------------------------------


class _Link:
    """The stream of copies of each device, the value whose copy out may still run, and what was fetched ahead.

    One for all threads: autograd runs the backward in a thread of its own.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.streams: dict[torch.device, torch.cuda.Stream] = {}
        self.leaving: dict[torch.device, tuple[torch.Tensor, torch.cuda.Event]] = {}
        self.ahead: dict[int, tuple[torch.Tensor, torch.cuda.Event]] = {}

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return self.streams[device]

    def settle(self, device: torch.device) -> None:
        """Let the main stream wait for the last copy out, after which its value's memory may be used again.

        So at most one value is held beyond its last reader, whatever the host runs ahead.
        """
        found = self.leaving.pop(device, None)
        if found is not None:
            torch.cuda.current_stream(device).wait_event(found[1])


_link = _Link()


def _to_pinned(x: torch.Tensor) -> torch.Tensor:
    _link.settle(x.device)
    handle = torch.empty(x.numel() * x.element_size(), dtype=torch.uint8, pin_memory=True)
    stale = _link.ahead.pop(handle.data_ptr(), None)  # a backward that ended early left it, for other bytes
    if stale is not None:
        torch.cuda.current_stream(x.device).wait_event(stale[1])
    stream = _link.stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        handle.copy_(_bytes_of(x), non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(stream)
    _link.leaving[x.device] = (x, done)
    return handle


def _begin(handle: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.cuda.Event]:
    """Start copying a handle's bytes to the device; the memory is the main stream's."""
    there = torch.empty(handle.numel(), dtype=torch.uint8, device=device)
    stream = _link.stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        there.copy_(handle, non_blocking=True)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(stream)
    return there, done


def _from_pinned(handle: torch.Tensor, upcoming: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    _link.settle(device)
    found = _link.ahead.pop(handle.data_ptr(), None)
    there, done = found if found is not None else _begin(handle, device)
    for other in upcoming:
        _link.ahead[other.data_ptr()] = _begin(other, device)
    torch.cuda.current_stream(device).wait_event(done)
    return there


# -- the ops -------------------------------------------------------------------------------------


@torch.library.impl("mstc::offload", "CompositeExplicitAutograd")
def _offload(x: torch.Tensor, strides: Sequence[int]) -> torch.Tensor:
    x = _laid_out(x, strides)
    if x.device.type != "cuda":
        return _to_file(x)
    with _link.lock:
        return _to_pinned(x)


@torch.library.impl("mstc::fetch", "CompositeExplicitAutograd")
def _fetch(
    handle: torch.Tensor,
    upcoming: Sequence[torch.Tensor],
    sizes: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    if device.type == "cuda":
        with _link.lock:
            there = _from_pinned(handle, upcoming, device)
        return torch.empty(0, dtype=dtype, device=device).set_(there.untyped_storage(), 0, sizes, strides)
    into = torch.empty_strided(sizes, strides, dtype=dtype, device=device)
    assert math.prod(sizes) * dtype.itemsize == handle.numel()
    _from_file(handle, into)
    return into
