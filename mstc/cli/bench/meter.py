"""Time and memory of training steps, on the CPU from the process's resident size, on CUDA from the allocator.

Memory is what a step needs at its peak above what rests between steps (weights, optimizer
state). On the CPU the kernel's high-water mark is reset after the warm-up. That is sharp only if
freed memory goes back to the system, so the worker runs with ``MALLOC_MMAP_THRESHOLD_`` set.
"""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

__all__ = ["Meter", "Timeline", "meter_for"]

MB = float(1 << 20)
T = TypeVar("T")


class Meter(Protocol):
    """Measures one device; memory in MB, None where the system does not tell."""

    def reset(self) -> None:
        """Take what is in use now as the rest, and forget the peak."""

    def rest(self) -> float | None: ...

    def peak(self) -> float | None:
        """The highest use since `reset`, above the rest."""

    def now(self) -> float | None:
        """The present use above the rest."""

    def timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """The value of ``work`` and the seconds that it took."""


class HostMeter:
    """The CPU: resident size and its high-water mark, as Linux counts them."""

    def __init__(self) -> None:
        self._rest: float | None = None

    def reset(self) -> None:
        gc.collect()
        _trim_heap()
        self._rest = _status_mb("VmRSS") if _reset_high_water_mark() else None

    def rest(self) -> float | None:
        return self._rest

    def peak(self) -> float | None:
        return None if self._rest is None else _status_mb("VmHWM") - self._rest

    def now(self) -> float | None:
        return None if self._rest is None else _status_mb("VmRSS") - self._rest

    def timed(self, work: Callable[[], T]) -> tuple[T, float]:
        start = time.perf_counter()
        value = work()
        return value, time.perf_counter() - start


class CudaMeter:
    """A GPU: the caching allocator's counts, and events for time."""

    def __init__(self) -> None:
        self._rest = 0.0

    def reset(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._rest = torch.cuda.memory_allocated() / MB

    def rest(self) -> float:
        return self._rest

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / MB - self._rest

    def now(self) -> float:
        return torch.cuda.memory_allocated() / MB - self._rest

    def timed(self, work: Callable[[], T]) -> tuple[T, float]:
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        value = work()
        end.record()
        end.synchronize()
        return value, float(start.elapsed_time(end)) / 1000


def meter_for(device: str) -> Meter:
    return CudaMeter() if device == "cuda" else HostMeter()


class Timeline:
    """Samples a meter's present use in a thread, as (seconds, MB above rest), while its block runs."""

    def __init__(self, meter: Meter, period_s: float = 0.02, most: int = 600) -> None:
        self._meter = meter
        self._period_s = period_s
        self._most = most
        self._samples: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Timeline:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def samples(self) -> list[tuple[float, float]]:
        """At most ``most`` samples, each the highest of its stretch of time."""
        stretch = -(-len(self._samples) // self._most) or 1
        groups = (self._samples[i : i + stretch] for i in range(0, len(self._samples), stretch))
        return [max(group, key=lambda sample: sample[1]) for group in groups]

    def _sample(self) -> None:
        while not self._done.wait(self._period_s):
            use = self._meter.now()
            if use is not None:
                self._samples.append((round(time.perf_counter() - self._start, 3), round(use, 1)))


def _status_mb(key: str) -> float:
    """A size in /proc/self/status, which Linux gives in kB."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / MB
    raise KeyError(f"/proc/self/status has no {key}")


def _reset_high_water_mark() -> bool:
    """Whether the mark could be reset: only Linux has it, and a container may forbid it."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True


def _trim_heap() -> None:
    """Give freed memory back to the system, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
