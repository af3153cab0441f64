"""Which form of a kernel runs: Triton on a GPU where the class has it, the chunked form elsewhere."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mstc.kernels.common.checks import fail

__all__ = ["takes_triton", "triton_form"]


def takes_triton(tensor: Tensor) -> bool:
    """float64 takes the chunked form on a GPU too: it is made of matrix products, and runs on any device."""
    return tensor.device.type == "cuda" and tensor.dtype != torch.float64


def triton_form(tensor: Tensor, name: str) -> ModuleType | None:
    """The Triton module of class ``name`` for a tensor that takes Triton; None for the chunked form."""
    if not takes_triton(tensor):
        return None
    if find_spec("triton") is None:
        first = "x" if name == "selective_scan" else "q"
        raise fail(first, f"device {tensor.device} without Triton", "a CPU tensor, or `pip install triton`")
    return import_module(f"mstc.kernels.{name}.triton")
