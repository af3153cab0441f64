"""mstc: a torch.compile backend that makes long sequences cheap.

``torch.compile(fn, backend="mstc")`` needs no import of this package. Importing it does not
import torch: each name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mstc.dump.explain import explain
    from mstc.errors import DumpError, LoopError, MstcError, OptionError, PlanError, StrictError, VerificationError
    from mstc.options import Options, parse_options
    from mstc.report import Report, clear_reports, reports
    from mstc.wrapper import wrap

__version__ = "0.1.0"

__all__ = [
    "DumpError",
    "LoopError",
    "MstcError",
    "OptionError",
    "Options",
    "PlanError",
    "Report",
    "StrictError",
    "VerificationError",
    "__version__",
    "clear_reports",
    "explain",
    "parse_options",
    "reports",
    "wrap",
]

_HOME = {
    "DumpError": "mstc.errors",
    "LoopError": "mstc.errors",
    "MstcError": "mstc.errors",
    "OptionError": "mstc.errors",
    "Options": "mstc.options",
    "PlanError": "mstc.errors",
    "Report": "mstc.report",
    "StrictError": "mstc.errors",
    "VerificationError": "mstc.errors",
    "clear_reports": "mstc.report",
    "explain": "mstc.dump.explain",
    "parse_options": "mstc.options",
    "reports": "mstc.report",
    "wrap": "mstc.wrapper",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mstc' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


import_module(
    "mstc.kernels.namespace"
)  # gives the namespace package mstc.kernels its names; loads neither torch nor triton
