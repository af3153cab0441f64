"""The function a user names as FILE.py:FUNCTION."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from mstc.compat.errors import quiet_tracing, raised_by_backend, unwrapped
from mstc.errors import DumpError, MstcError

__all__ = ["Call", "call_of", "said", "tracing"]

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def call_of(target: str, seq: int | None, device: str | None) -> Call:
    """What FUNCTION returns: the function to look into, and its arguments.

    seq: handed to FUNCTION as ``seq``; device: the default one while it runs. Raises `DumpError` on bad input.
    """
    path, _, name = target.rpartition(":")
    if not path or not name:
        raise DumpError(f"'{target}' must be FILE.py:FUNCTION, for example train.py:loss")
    builder = getattr(_load(Path(path)), name, None)
    if not callable(builder):
        raise DumpError(f"{path} has no function '{name}'")
    given = _given(target, builder, seq)
    try:
        with torch.device(device) if device else nullcontext():
            made = builder(**given)
    except Exception as e:
        raise DumpError(f"{target} raised {said(e)}") from e
    if not isinstance(made, tuple) or not made or not callable(made[0]):
        raise DumpError(
            f"{target} must return the function to look into and its arguments, as in `return loss_fn, ids`; "
            f"it returned {type(made).__name__}"
        )
    return made[0], made[1:]


def _given(target: str, builder: Callable[..., Any], seq: int | None) -> dict[str, int]:
    parameters = inspect.signature(builder).parameters.values()
    missing = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    takes = any(p.name == "seq" for p in parameters)
    if seq is not None and not takes:
        raise DumpError(f"{target} takes no argument 'seq', which is to get the number of tokens")
    if missing and missing != ["seq"]:
        raise DumpError(f"{target} needs {', '.join(missing)}; it may take seq alone, and must make the rest itself")
    if missing and seq is None:
        raise DumpError(f"{target} takes seq: give --seq")
    return {"seq": seq} if seq is not None else {}


def _load(path: Path) -> Any:
    if not path.is_file():
        raise DumpError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise DumpError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise DumpError(f"{path} raised {said(e)}") from e
    finally:
        sys.path.remove(str(path.parent))
    return module


@contextmanager
def tracing(target: str) -> Iterator[None]:
    """What the user's function raises while it is traced becomes a `DumpError` of one line.

    Errors of mstc come out as they are, even where Dynamo has wrapped them, and so does a backend that fails otherwise.
    """
    try:
        with quiet_tracing():
            yield
    except Exception as e:
        inner = unwrapped(e)
        if isinstance(inner, MstcError):
            raise inner from None
        if raised_by_backend(e):
            raise
        raise DumpError(f"{target}: the function raised {said(inner)}") from e


def said(error: BaseException) -> str:
    """The error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
