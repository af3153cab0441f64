"""Which form of a kernel runs: Triton on a GPU where the class has it, the chunked form elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mstc.kernels.common.checks import fail

__all__ = ["triton_form"]


def triton_form(tensor: Tensor, name: str, operands: Sequence[Tensor | None] = ()) -> ModuleType | None:
    """The Triton module of class ``name`` for a tensor on a GPU; None for the chunked form.

    float64, and operands that a module's ``covers`` declines, take the chunked form on a GPU too: it is made of matrix
    products, and runs on any device.
    """
    if tensor.device.type != "cuda" or tensor.dtype == torch.float64:
        return None
    if find_spec("triton") is None:
        raise fail("q", f"device {tensor.device} without Triton", "a CPU tensor, or `pip install triton`")
    kernels = import_module(f"mstc.kernels.{name}.triton")
    covers = getattr(kernels, "covers", None)
    return kernels if covers is None or covers(*operands) else None
