"""Which form of a kernel runs: Triton on a GPU, the chunked form elsewhere."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor

from mstc.kernels.common.checks import fail

__all__ = ["triton_form"]


def triton_form(tensor: Tensor, name: str) -> ModuleType | None:
    """The Triton module of class ``name`` for a tensor on a GPU, None elsewhere.

    A class without Triton kernels, or a GPU without Triton, is an error: nothing runs slowly in silence.
    """
    if tensor.device.type != "cuda":
        return None
    if find_spec("triton") is None:
        raise fail("q", f"device {tensor.device} without Triton", "a CPU tensor, or `pip install triton`")
    module = f"mstc.kernels.{name}.triton"
    if find_spec(module) is None:
        raise fail("q", f"device {tensor.device}", f"a CPU tensor: {name} has no Triton kernels yet")
    return import_module(module)
