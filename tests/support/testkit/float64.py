"""Running a model truly in float64.

Many models cast to float32 inside (norms, rotary angles, `softmax(dtype=float32)`, `logits.float()`), so that a model
in float64 is only partly float64 and eager itself is no more exact than 1e-7. `true_float64` turns those casts into
casts to float64. It is a `TorchFunctionMode`, which Dynamo traces like the code it wraps: entered around both the eager
and the compiled call, it changes both in the same way, and mstc sees a graph in which every float is a float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoFloat32(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


@contextlib.contextmanager
def true_float64() -> Iterator[None]:
    """Casts to float32 become casts to float64, and new tensors are float64 unless they say otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _NoFloat32():
            yield
    finally:
        torch.set_default_dtype(before)
