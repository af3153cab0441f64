"""Who allocates the buffers of compiled code, and who else holds a storage: public PyTorch does not tell."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["allocating_by", "references"]


@contextlib.contextmanager
def allocating_by(empty_strided: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Code that Inductor writes meanwhile asks ``empty_strided(shape, stride, dtype)`` for its CPU buffers.

    Its wrapper binds ``torch._C._dynamo.guards._empty_strided_cpu`` when it is loaded, and offers no other hook. A
    wrapper that was loaded before (the same code in another graph) keeps the allocator it has: slower, never wrong.
    """
    guards: Any = torch._C._dynamo.guards
    plain = guards._empty_strided_cpu
    guards._empty_strided_cpu = empty_strided
    try:
        yield
    finally:
        guards._empty_strided_cpu = plain


def references(storage: torch.UntypedStorage) -> int:
    """How many tensors and Python objects share a storage's memory."""
    return int(torch._C._storage_Use_Count(storage._cdata))
