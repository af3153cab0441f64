"""Autocast: the inputs that feed matrix products are cast, decays and states are not; inside it is off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["register_autocast", "under_autocast"]

Result = TypeVar("Result")
_LIBRARY: Any = torch.library.Library("mstc", "FRAGMENT")  # type: ignore[no-untyped-call]
_DEVICES = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}


def register_autocast(op: Any, name: str, cast: int) -> None:
    """Under autocast, cast the first ``cast`` arguments of ``mstc::name`` and call ``op`` with autocast off."""
    for key, device in _DEVICES.items():
        _LIBRARY.impl(name, _caster(op, device, cast), key)


def under_autocast(form: Callable[..., Result], device: str, cast: int) -> Callable[..., Result]:
    """``form``, called as autocast would have it called where autocast is on: its first ``cast`` arguments are cast."""
    return _caster(form, device, cast) if torch.is_autocast_enabled(device) else form


def _caster(op: Any, device: str, cast: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(device)
        head = [_cast(arg, dtype, device) for arg in args[:cast]]
        with torch.autocast(device, enabled=False):
            return op(*head, *args[cast:], **kwargs)

    return call


def _cast(arg: Any, dtype: torch.dtype, device: str) -> Any:
    wanted = isinstance(arg, Tensor) and arg.device.type == device and arg.is_floating_point()
    return arg.to(dtype) if wanted and arg.dtype != torch.float64 else arg
