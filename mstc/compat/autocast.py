"""Autocast written out as casts while a graph is retraced (it is made of private PyTorch APIs).

Autocast is a dispatch key: an op that it knows has a kernel there, which casts the arguments and calls the op anew with
the key switched off. Retracing before autograd records ops above that key, so a graph would keep the *switches*. The
mode here hands each op to its autocast kernel first and records what comes out of it: the casts and the op. What
autocast does is thus PyTorch's own, for each op, device and version.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
import torch.utils._pytree as pytree
from torch._decomp import _should_decompose_because_unsafe_op
from torch._ops import OpOverload
from torch._subclasses.functional_tensor import FunctionalTensorMode

__all__ = [
    "CastingMode",
    "Switches",
    "any_autocast",
    "drop_switches",
    "is_switch",
    "no_autocast",
    "off_at_run_time",
    "running_without",
]

aten = torch.ops.aten

_ENTER = torch.amp.autocast_mode._enter_autocast
_EXIT = torch.amp.autocast_mode._exit_autocast
_NAMES = {
    "cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS", "hpu": "HPU",
    "mtia": "MTIA", "xla": "XLA", "privateuseone": "PrivateUse1",
}  # fmt: skip
_KEYS: dict[str, torch._C.DispatchKey] = {
    device: key
    for device, name in _NAMES.items()
    if (key := getattr(torch._C.DispatchKey, f"Autocast{name}", None)) is not None
}
# A device type that autocast supports and no graph of ours has tensors of.
_ELSEWHERE = "ipu"

# Made of one step per token, which would be written out.
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")

# Made of an op without a derivative where none is asked for, which functional tensors do not say.
_ASKING = ("embedding_bag",)

# Made of a check of success too, which has an effect and no value: only AOTAutograd can keep that in a graph.
_CHECKED = (
    "linalg_inv",
    "linalg_cholesky",
    "linalg_solve",
    "linalg_lu_factor",
    "linalg_ldl_factor",
    "linalg_tensorinv",
)

# Made of a softmax and a loss, which autocast runs in float32, where it has no kernel of its own.
_FLOAT32_WHOLE = (aten.cross_entropy_loss.default,)


def any_autocast() -> bool:
    """Whether autocast is on, for any device."""
    return bool(torch._C._is_any_autocast_enabled())


def no_autocast() -> contextlib.AbstractContextManager[None]:
    """Autocast off for all devices; as cheap as a C++ guard."""
    return torch._C._DisableAutocast()


@contextlib.contextmanager
def off_at_run_time() -> Iterator[None]:
    """Compile what holds its casts already: autocast is off while it is traced, and will be whenever it runs.

    AOTAutograd switches autocast off around a compiled forward and backward only where it is on for some device
    while compiling; so it is, for a device type that the graph has no tensors of.
    """
    with no_autocast():
        before = torch.is_autocast_enabled(_ELSEWHERE)
        torch.set_autocast_enabled(_ELSEWHERE, True)
        try:
            yield
        finally:
            torch.set_autocast_enabled(_ELSEWHERE, before)


def running_without(fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn`` with autocast off while it runs; itself where autocast is off, which Dynamo guards on."""
    if not any_autocast():
        return fn

    def run(*inputs: Any) -> Any:
        with no_autocast():
            return fn(*inputs)

    return run


def is_switch(target: object) -> bool:
    return target in (_ENTER, _EXIT)


def drop_switches(graph: fx.Graph) -> None:
    """Erase the switches that retracing recorded: their effect is written out."""
    for node in reversed(graph.nodes):
        if node.op == "call_function" and is_switch(node.target):
            graph.erase_node(node)


class Switches:
    """Autocast as a Dynamo graph switches it on and off, for an interpreter that runs the graph."""

    def __init__(self) -> None:
        self._open: list[torch.autocast] = []

    def call(self, target: Callable[..., Any], args: tuple[Any, ...]) -> torch.autocast | None:
        """Run ``_enter_autocast`` or ``_exit_autocast``."""
        # Without the function modes, which would record the switch instead.
        with torch._C.DisableTorchFunction():
            if target is _ENTER:
                self._open.append(torch.autocast(*args))
                self._open[-1].__enter__()  # type: ignore[no-untyped-call]
                return self._open[-1]
            args[0].__exit__(None, None, None)
            self._open.remove(args[0])
        return None

    def close(self) -> None:
        """Leave whatever an error left open."""
        while self._open:
            self._open.pop().__exit__(None, None, None)


class CastingMode(FunctionalTensorMode):  # type: ignore[no-untyped-call]
    """Functionalization before autograd; autocast, and dropout that draws nothing, are applied and not recorded.

    whole: which ops are recorded as they are where PyTorch's own autograd would see the ops that they are made of.
    """

    def __init__(self, whole: Callable[[OpOverload], bool]) -> None:
        super().__init__(pre_dispatch=True, export=True)
        self._casts = 0
        self._whole = whole

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.dropout.default and not _draws(*args, **kwargs):
            return self._idle_dropout(*args, **kwargs)
        if not isinstance(func, OpOverload):
            return super().__torch_dispatch__(func, types, args, kwargs)
        devices = _devices(args, kwargs) if any_autocast() else {}
        key = next((k for k in devices.values() if _has_kernel(func, k)), None)
        if key is not None:
            self._casts += 1
            with self:
                return func._op_dk(key, *args, **kwargs)
        if _is_made_of_others(func) and not self._whole(func):
            with self:
                return func.decompose(*args, **kwargs)
        if not devices or _is_view_or_write(func):
            return super().__torch_dispatch__(func, types, args, kwargs)
        if func in _FLOAT32_WHOLE:
            args, kwargs = self._in_float32(args, kwargs)
        elif func._can_decompose() and _may_be_taken_apart(func):
            before = self._casts
            with self:
                result = func.decompose(*args, **kwargs)
            if self._casts != before:
                return result
            # Autocast does not touch it: it stays whole, and its parts go as dead code.
        with no_autocast():
            return super().__torch_dispatch__(func, types, args, kwargs)

    def _idle_dropout(self, x: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        """Dropout of nothing returns its input itself, as in eager; dropout of everything zeros (nan stays nan).

        As a random op it would keep its place and part regions.
        """
        if p == 0 or not train:
            return x
        with self:
            return x * 0.0

    def _in_float32(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def widen(x: torch.Tensor) -> torch.Tensor:
            return x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x

        self._casts += 1
        with self:
            found: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(torch.Tensor, widen, (args, kwargs))
        return found


@functools.cache
def _is_view_or_write(func: OpOverload) -> bool:
    """Whether functionalization takes the op apart by itself, where it can be."""
    aliases = any(a.alias_info for a in func._schema.arguments)
    return aliases or func._schema.is_mutable or _should_decompose_because_unsafe_op(func)


@functools.cache
def _is_made_of_others(func: OpOverload) -> bool:
    """Whether PyTorch has no derivative for the op but runs others in its place, not once per token."""
    if func.namespace != "aten" or not func._can_decompose() or not _may_be_taken_apart(func):
        return False
    tensors = all("Tensor" in str(r.type) for r in func._schema.returns)
    return tensors and func.overloadpacket.__name__ not in (*_RECURRENT, *_ASKING)


def _may_be_taken_apart(func: OpOverload) -> bool:
    """Whether its parts draw no random numbers and have no effects."""
    return torch.Tag.nondeterministic_seeded not in func.tags and func.overloadpacket.__name__ not in _CHECKED


def _draws(x: torch.Tensor, p: float, train: bool) -> bool:
    return train and 0 < p < 1


def _devices(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, torch._C.DispatchKey]:
    """Device types of the tensors for which autocast is on now, with their keys."""
    found: dict[str, torch._C.DispatchKey] = {}
    for value in pytree.tree_leaves((args, kwargs)):
        if isinstance(value, torch.Tensor):
            key = _KEYS.get(value.device.type)
            if key is not None and not torch._C._dispatch_tls_is_dispatch_key_excluded(key):
                found[value.device.type] = key
    return found


def _has_kernel(func: OpOverload, key: torch._C.DispatchKey) -> bool:
    name: str = func.name()  # type: ignore[no-untyped-call]
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        name, key
    ) and not torch._C._dispatch_kernel_for_dispatch_key_is_fallthrough(name, key)
