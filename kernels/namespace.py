"""The names of ``mstc.kernels``, each loaded when first used.

``kernels/`` holds no ``__init__.py``, so that the folder does not hide Hugging Face's package
``kernels`` where the repository lies on the path. ``mstc.kernels`` is therefore a namespace
package; importing this module, as ``mstc/__init__.py`` does, gives it its names.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__all__ = ["NAMES"]

NAMES = {
    "KernelArgumentError": "mstc.kernels.common.checks",
    "dplr_attention": "mstc.kernels.api",
    "linear_attention": "mstc.kernels.api",
    "merge": "mstc.kernels.sliding_window.merge",
    "selective_scan": "mstc.kernels.selective_scan.op",
    "sliding_window_attention": "mstc.kernels.sliding_window.op",
}


class _Kernels(ModuleType):
    """A module whose public names come from ``NAMES`` (its class may be set: see the data model's chapter)."""

    def __getattr__(self, name: str) -> Any:
        if name not in NAMES:
            raise AttributeError(f"module 'mstc.kernels' has no attribute '{name}'")
        value = getattr(import_module(NAMES[name]), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """A submodule that is imported does not hide the public name that it shares (``selective_scan``)."""
        if not (name in NAMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *NAMES})


sys.modules["mstc.kernels"].__class__ = _Kernels
