"""What a device can do: a table with a source for each number, or what `mstc calibrate` measured on this one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import platformdirs
import torch

from mstc.errors import PlanError

TABLE = Path(__file__).with_name("devices.json")

# Assumed of a device that was not calibrated: the share of its peak that large products reach, the share of its
# bandwidth that copies reach, the rows at which a product reaches half of that share, seconds per kernel.
LARGE_PRODUCTS = 0.7
COPIES = 0.85
HALF_ROWS = 128.0
LAUNCH_S = 8e-6


@dataclass(frozen=True)
class Device:
    """Bytes, FLOPs per second by dtype (2 per multiply-add), bytes per second of memory and of the link to the host
    (of a CPU: to pages that are new).

    context: bytes that the driver takes; reached: share of ``flops`` that large products reach; half_rows: rows at
    which a product reaches half of that; launch: seconds per kernel; attention: share reached by attention.
    """

    name: str
    label: str
    memory: int
    flops: Mapping[str, float]
    bandwidth: float
    link: float
    context: int = 0
    reached: float = LARGE_PRODUCTS
    attention: float = LARGE_PRODUCTS
    copies: float = COPIES
    half_rows: float = HALF_ROWS
    launch: float = LAUNCH_S
    sources: Mapping[str, str] = field(default_factory=dict)

    def usable(self) -> int:
        """What a process can allocate."""
        return self.memory - self.context

    @property
    def kind(self) -> str:
        """As PyTorch calls devices: "cpu", or "cuda" for NVIDIA's and AMD's GPUs."""
        return "cpu" if self.name == "cpu" else "cuda"

    @property
    def overlaps(self) -> bool:
        """Whether copies to the host run beside computation."""
        return self.kind != "cpu"

    def seconds(
        self,
        flops: float,
        moved: float,
        rows: float,
        kernels: float,
        dtype: str,
        mixer: bool = False,
        fresh: float = 0.0,
    ) -> float:
        """The larger of compute and memory time, plus overhead: a roofline with efficiency by size.

        fresh: bytes that are asked of the system; a GPU's allocator hands out again what it has, but a CPU's pages are
        faulted in and cleared one by one, at the pace of ``link``.
        """
        share = self.attention if mixer else self.reached * (rows / (rows + self.half_rows) if rows else 1.0)
        peak = self.flops.get(dtype, self.flops["float32"])
        paged = fresh / self.link if self.kind == "cpu" else 0.0
        return max(flops / (peak * share), moved / (self.bandwidth * self.copies)) + kernels * self.launch + paged


def names() -> tuple[str, ...]:
    return (*_table(), "this")


def device(name: str) -> Device:
    """A device of the table, or "this": the calibrated machine. Raises `PlanError` for an unknown or missing one."""
    if name == "this":
        return calibrated()
    table = _table()
    if name not in table:
        raise PlanError(f"unknown device '{name}' (known: {', '.join(names())})")
    return Device(name=name, **table[name])


def local(kind: str) -> Device:
    """This machine as a plan at compile time knows it: calibrated, in the table, or nominal ("cpu", "cuda")."""
    if stored().exists():
        found = calibrated()
        if (found.kind == "cpu") == (kind != "cuda"):
            return found
    if kind == "cuda" and torch.cuda.is_available():
        label, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
        alike = [device(n) for n in _table() if n.split("-")[0].upper() in label.upper()]
        if alike:
            return min(alike, key=lambda d: abs(d.memory - memory))
    return _nominal()


def _nominal() -> Device:
    """A CPU of the usual kind: 2 AVX2 multiply-adds of 8 float32 at 3 GHz per core; enough to rank plans by."""
    cores = torch.get_num_threads()
    flops = {"float32": 96e9 * cores, "float64": 48e9 * cores, "bfloat16": 96e9 * cores}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 34
    return Device("cpu", "this CPU (not calibrated)", memory, flops, 20e9, 2e9, half_rows=32.0, launch=2e-5)


def stored() -> Path:
    """Where calibrations lie; MSTC_CACHE_DIR moves it."""
    folder = os.environ.get("MSTC_CACHE_DIR") or platformdirs.user_cache_dir("mstc")
    return Path(folder) / "calibration.json"


def calibrated() -> Device:
    """What `mstc calibrate` measured here. Raises `PlanError` where there is none."""
    path = stored()
    if not path.exists():
        raise PlanError(f"this machine is not calibrated ({path} is missing): run `mstc calibrate` first")
    return Device(**json.loads(path.read_text(encoding="utf-8")))


def store(found: Device) -> Path:
    path = stored()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    return path


def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table
