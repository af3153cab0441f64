"""Checks of arguments; each error names the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from mstc.errors import MstcError

__all__ = [
    "MAX_HEAD_DIM",
    "KernelArgumentError",
    "check_attention_inputs",
    "check_device",
    "check_dtype",
    "check_head_dim",
    "check_offsets",
    "check_offsets_form",
    "check_same_dtype",
    "check_shape",
    "check_tensors",
    "fail",
    "scale_of",
]

MAX_HEAD_DIM = 256
"""Largest K and V: a [K, V] state in float32 must fit the registers and shared memory of one program."""

INPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class KernelArgumentError(MstcError, ValueError):
    """An argument of a kernel has a shape, dtype, device or value that is not allowed."""


def fail(name: str, given: object, allowed: str) -> KernelArgumentError:
    """The error for argument ``name``; the caller raises it."""
    return KernelArgumentError(f"{name}: got {given}; allowed: {allowed}")


def check_shape(name: str, tensor: Tensor, dims: Sequence[tuple[str, int]]) -> None:
    """Raise unless ``tensor`` has the shape spelt by ``dims``, a sequence of (letter, size)."""
    expected = tuple(size for _, size in dims)
    if tensor.dim() != len(expected) or any(a != b for a, b in zip(tensor.shape, expected, strict=True)):
        letters = ", ".join(f"{letter}={size}" for letter, size in dims)
        raise fail(name, f"shape {list(tensor.shape)}", f"[{letters}]")


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype] = INPUT_DTYPES) -> None:
    """Raise unless ``tensor.dtype`` is among ``allowed``."""
    if tensor.dtype not in allowed:
        raise fail(name, f"dtype {tensor.dtype}", ", ".join(str(dtype) for dtype in allowed))


def check_device(reference: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Raise unless all tensors lie on the device of ``tensors[reference]``."""
    first = tensors[reference]
    assert first is not None
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != first.device:
            raise fail(name, f"device {tensor.device}", f"the device of {reference}, {first.device}")


def check_tensors(required: Mapping[str, Tensor], optional: Mapping[str, Tensor | None]) -> None:
    """Raise unless all are tensors of one device (the first's), of dtypes that kernels take, without tangents.

    An optional one may be None, and ``cu_seqlens`` is of integers (see ``check_offsets_form``).
    """
    named = {**required, **optional}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor) and not (tensor is None and name in optional):
            raise fail(name, type(tensor).__name__, "a tensor" if name in required else "a tensor or None")
    check_device(next(iter(required)), named)
    for name, tensor in named.items():
        if tensor is not None and name != "cu_seqlens":
            check_dtype(name, tensor)
            check_no_tangent(name, tensor)


def check_no_tangent(name: str, tensor: Tensor) -> None:
    """Raise under forward-mode AD: an op would drop the tangent without a word. (Dynamo cannot trace the question.)"""
    if not torch.compiler.is_compiling() and unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise fail(name, "a tensor with a tangent (forward-mode AD)", "reverse-mode gradients only")


def scale_of(scale: object, key: int) -> float:
    """The scale as given, K ** -0.5 for None. Raise unless it is a number: a tensor's gradient would be lost."""
    if scale is None:
        usual: float = key**-0.5
        return usual
    if isinstance(scale, bool) or not isinstance(scale, int | float | torch.SymInt | torch.SymFloat):
        raise fail("scale", type(scale).__name__, "a number or None")
    return cast("float", scale)  # a symbol stands for a number


def check_head_dim(name: str, size: int) -> None:
    """Raise unless 1 <= size <= MAX_HEAD_DIM."""
    if not 1 <= size <= MAX_HEAD_DIM:
        raise fail(name, f"last dimension {size}", f"1 to {MAX_HEAD_DIM}")


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q and k are [B, T, H, K] and v is [B, T, H, V], of one dtype (or under autocast)."""
    if q.dim() != 4:
        raise fail("q", f"shape {list(q.shape)}", "[B, T, H, K]")
    batch, length, heads, key = q.shape
    if length < 1:
        raise fail("q", f"T={length}", "at least one token")
    check_head_dim("q", key)
    check_shape("k", k, [("B", batch), ("T", length), ("H", heads), ("K", key)])
    if v.dim() != 4:
        raise fail("v", f"shape {list(v.shape)}", "[B, T, H, V]")
    check_head_dim("v", v.shape[-1])
    check_shape("v", v, [("B", batch), ("T", length), ("H", heads), ("V", v.shape[-1])])
    check_same_dtype("k", k, q)
    check_same_dtype("v", v, q)


def check_same_dtype(name: str, tensor: Tensor, q: Tensor) -> None:
    """Raise unless the dtype is that of q; autocast brings them to one."""
    if tensor.dtype != q.dtype and not torch.is_autocast_enabled(q.device.type):
        raise fail(name, f"dtype {tensor.dtype}", f"the dtype of q, {q.dtype}, or autocast")


def check_offsets_form(cu_seqlens: Tensor, batch: int) -> None:
    """What can be checked of ``cu_seqlens`` without its values."""
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise fail("cu_seqlens", f"shape {list(cu_seqlens.shape)}", "one dimension with at least 2 entries")
    check_dtype("cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    if batch != 1:
        raise fail("cu_seqlens", f"a batch of B={batch}", "B=1, the documents packed along T")


def check_offsets(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The offsets as a list: they start at 0, never fall and end at ``tokens``."""
    offsets: list[int] = cu_seqlens.tolist()
    rising = all(a <= b for a, b in pairwise(offsets))
    if offsets[0] != 0 or offsets[-1] != tokens or not rising:
        raise fail("cu_seqlens", offsets, f"0 first, T={tokens} last, never falling")
    return offsets
