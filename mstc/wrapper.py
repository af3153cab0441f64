"""The wrapper way in, beside the backend: `mstc.wrap`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from mstc.options import parse_options

__all__ = ["wrap"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def wrap(model: ModuleT, options: Mapping[str, Any] | None = None) -> ModuleT:
    """Compile ``model`` in place with the backend and return it.

    The class, the keys of ``state_dict``, hooks and methods such as ``generate`` stay as they
    are; only calls of the module run compiled, from the first call on. A module that returns
    logits beside its loss must keep them: name them in ``unused_outputs`` if nothing reads them.

    Raises TypeError when ``model`` is no ``nn.Module``, `OptionError` at once on bad options.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"mstc.wrap needs an nn.Module, got {type(model).__name__}; "
            'compile a function with torch.compile(fn, backend="mstc")'
        )
    parse_options(options)
    model.compile(backend="mstc", options=dict(options or {}))
    return model
