"""An eager step on meta tensors, as the allocator of a device would see it: bytes live, FLOPs, bytes moved.

Meta tensors have sizes and lifetimes but no data, so this is the real schedule of eager PyTorch, autograd and
checkpointing included, with nothing computed.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

from mstc import compat
from mstc.plan.devices import Device

_active: list[Tracker] = []


@dataclass(frozen=True)
class _Made:
    """What an op makes of operands of one kind: layers repeat, and shapes are looked up faster than derived."""

    layouts: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    several: bool
    flops: float
    moved: float

    @staticmethod
    def of(out: Any, flops: float, moved: float) -> _Made | None:
        """None where the op makes anything but dense tensors."""
        several = isinstance(out, tuple)
        tensors = out if several else (out,)
        if not all(isinstance(t, torch.Tensor) and t.device.type == "meta" for t in tensors):
            return None
        made = _Made(tuple((t.shape, t.stride(), t.dtype) for t in tensors), several, flops, moved)
        sizes = zip(tensors, made.make(), strict=True)
        return made if all(t.untyped_storage().nbytes() == m.untyped_storage().nbytes() for t, m in sizes) else None

    def make(self) -> list[torch.Tensor]:
        return [torch.empty_strided(size, stride, dtype=d, device="meta") for size, stride, d in self.layouts]


class Tracker(compat.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is made while it is entered; what was made before is the caller's to count.

    events: (name, bytes) of each storage that was made, (name, 0) of each that was freed, in order.
    """

    def __init__(self, device: Device, dtype: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.dtype = device, dtype
        self.live = self.peak = 0
        self.seconds = 0.0
        self.events: list[tuple[int, int]] = []
        self._known: dict[int, tuple[int, int]] = {}
        self._repeated: dict[Hashable, _Made | None] = {}

    def __enter__(self) -> Any:
        _active.append(self)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _active.remove(self)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        key = _key(func, args, kwargs or {})
        known = self._repeated.get(key)
        if known is not None:
            out = tuple(known.make())
            for t in out:
                self._see(t)
            self.spend(known.flops, known.moved)
            return out if known.several else out[0]
        out = func(*args, **(kwargs or {}))
        made = sum(self._see(t) for t in compat.tree_leaves(out) if isinstance(t, torch.Tensor))
        if made or any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
            read = sum(_nbytes(t) for t in compat.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
            count = flop_registry.get(func.overloadpacket)
            flops = float(count(*args, **(kwargs or {}), out_val=out)) if count is not None else 0.0
            moved = float(read + max(made, 0))
            self.spend(flops, moved)
            if key is not None:
                self._repeated[key] = _Made.of(out, flops, moved)
        return out

    def spend(self, flops: float, moved: float, mixer: bool = False) -> None:
        self.seconds += self.device.seconds(flops, moved, 0.0, 1, self.dtype, mixer)

    def _see(self, tensor: torch.Tensor) -> int:
        """The bytes that this tensor adds to what is live."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return 0
        name, size = self._known[key] = len(self.events), storage.nbytes()
        if size:
            self.events.append((name, size))
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)
        return size

    def know(self, tensor: torch.Tensor) -> None:
        """Leave a tensor out of the count: the caller counts it."""
        self._known[tensor.untyped_storage()._cdata] = (-1, 0)

    def close(self) -> None:
        """Count no further: what is freed from now on belongs to no step."""
        self._known.clear()

    def _gone(self, key: int) -> None:
        name, size = self._known.pop(key, (-1, 0))
        if size:
            self.events.append((name, 0))
        self.live -= size


def _key(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Hashable:
    """What decides on what an op makes, None where it may write to or return what it was given."""
    if not _makes_anew(func):
        return None
    return func, tuple(map(_kind, args)), tuple((name, _kind(value)) for name, value in kwargs.items())


@cache
def _makes_anew(func: Any) -> bool:
    return all(a.alias_info is None for a in (*func._schema.arguments, *func._schema.returns))


def _kind(value: Any) -> Hashable:
    """Of an operand what decides on layouts: of a tensor its own, of anything else its type and value."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_kind, value))
    return type(value), value


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Flash(torch.autograd.Function):
    """The memory of FlashAttention-2: the forward makes the output and the log-sum-exp; the backward a float32
    accumulator of dq, the row sums, and where heads share keys and values, dk and dv for every head."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.causal = causal
        _attend(q, k, 1.0, causal)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, _, lse = ctx.saved_tensors
        accumulator = torch.empty(q.shape, dtype=torch.float32, device=q.device)
        sums = torch.empty_like(lse)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        if k.shape[1] != q.shape[1]:
            expanded = [torch.empty((*q.shape[:1], q.shape[1], *k.shape[2:]), dtype=k.dtype, device=k.device)] * 2
            del expanded
        _attend(q, k, 2.5, ctx.causal)
        del accumulator, sums
        return dq, dk, dv, None


def _attend(q: torch.Tensor, k: torch.Tensor, times: float, causal: bool) -> None:
    """Forward 2 products of S x S, backward 5; half of each where causal."""
    flops = times * 4.0 * q.numel() * k.shape[2] / (2 if causal else 1)
    for tracker in _active:
        tracker.spend(flops, times * 2.0 * (_nbytes(q) + _nbytes(k)), mixer=True)


def flash(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **settings: Any) -> Any:
    """`Flash` as Hugging Face models call their attention."""
    out: torch.Tensor = Flash.apply(q, k, v, getattr(module, "is_causal", True))  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None
