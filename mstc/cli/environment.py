"""What the figures depend on: versions of the software and the size of the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from mstc.ops import products

__all__ = ["available_cores", "describe_machine", "describe_versions"]

_PACKAGES = ("torch", "triton", "transformers", "mstc")


def describe_versions() -> dict[str, str]:
    """Python's version and each package's, "not installed" where there is none."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def describe_machine() -> dict[str, object]:
    """System, processor, usable cores, whose products multiply float32 in loops on it, and GPUs."""
    return {
        "system": platform.system(),
        "processor": torch.cpu.get_capabilities().get("cpu_name") or platform.machine(),
        "cores": available_cores(),
        "float32 products": "oneDNN" if products.onednn_is_faster() else "PyTorch",
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
