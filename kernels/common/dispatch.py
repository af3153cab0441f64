"""Which form of a kernel runs: Triton on a GPU where the class has it, the chunked form elsewhere."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mstc.kernels.common.checks import fail

__all__ = ["triton_form"]


def triton_form(tensor: Tensor, name: str) -> ModuleType | None:
    """The Triton module of class ``name`` for a tensor on a GPU; None for the chunked form.

    float64 takes the chunked form on a GPU too: it is made of matrix products, and runs on any device.
    """
    if tensor.device.type != "cuda" or tensor.dtype == torch.float64:
        return None
    if find_spec("triton") is None:
        raise fail("q", f"device {tensor.device} without Triton", "a CPU tensor, or `pip install triton`")
    return import_module(f"mstc.kernels.{name}.triton")
