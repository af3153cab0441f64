"""Errors that mstc raises; each message names what was given and what to do."""

from __future__ import annotations

__all__ = ["DumpError", "LoopError", "MstcError", "OptionError", "PlanError", "StrictError", "VerificationError"]


class MstcError(Exception):
    """Base of all errors of mstc."""


class OptionError(MstcError, ValueError):
    """An option's key, value or type is not allowed, or what it asks for is not built yet."""


class StrictError(MstcError):
    """A pass that was asked for changed nothing, under ``options={"strict": True}``."""


class VerificationError(MstcError):
    """A pass changed the numbers, under ``options={"verify": True}``."""


class LoopError(MstcError, RuntimeError):
    """A loop was used in a way that it cannot support (double backward, a lost body, ...)."""


class DumpError(MstcError, ValueError):
    """What was asked to be looked into, or to be read as a dump, is none."""


class PlanError(MstcError, ValueError):
    """No plan meets the memory budget, or a device or model to plan for is not known."""
