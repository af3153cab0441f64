"""Loop programs: what one loop op runs, and the registry from which the op fetches it by key."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mstc.errors import LoopError
from mstc.ops.body import Factors, Value
from mstc.ops.pieces import balanced


@dataclass(frozen=True)
class Backward:
    """Compiled backward bodies by chunk length, and how to call them (see `mstc.ops.body.BackwardBody`)."""

    run: dict[int, Callable[..., Any]]
    tokens: tuple[int, ...]
    shared: tuple[int, ...]
    kept: tuple[int, ...]
    grads: tuple[int, ...]
    token_grads: dict[int, int]
    shared_grads: dict[int, int]
    factors: tuple[Factors, ...]
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class Program:
    """Everything that a loop op needs at run time.

    n: length of the axis; count: number of chunks; tokens, shared, outputs, sums: the whole tensors;
    token_needs, shared_needs: which inputs get gradients; forward: compiled bodies by chunk
    length (empty where a loss's gradients come with it); backward: None in inference;
    accumulate: "float32" or "param", for sums over chunks of shared inputs' gradients.
    """

    key: str
    label: str
    n: int
    count: int
    tokens: tuple[Value, ...]
    shared: tuple[Value, ...]
    outputs: tuple[Value, ...]
    sums: tuple[Value, ...]
    token_needs: tuple[bool, ...]
    shared_needs: tuple[bool, ...]
    forward: dict[int, Callable[..., Any]]
    backward: Backward | None
    accumulate: str
    flops_forward: float = 0.0
    flops_backward: float = 0.0
    chunks: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chunks.extend(balanced(self.n, self.count))

    def accumulator_dtype(self, dtype: torch.dtype) -> torch.dtype:
        low = dtype in (torch.bfloat16, torch.float16)
        return torch.float32 if low and self.accumulate == "float32" else dtype


_programs: dict[str, Program] = {}
_lock = threading.Lock()


def register(program: Program) -> None:
    with _lock:
        _programs[program.key] = program


def program(key: str) -> Program:
    """The program of that key.

    Raises `LoopError` where it is gone: after ``torch._dynamo.reset()``, or in another process.
    """
    found = _programs.get(key)
    if found is None:
        raise LoopError(
            f"no loop body is known under {key}: the graph was compiled in another process or before "
            "torch._dynamo.reset(); call the compiled function anew so that it is compiled here"
        )
    return found


def known(key: str) -> bool:
    return key in _programs


def clear() -> None:
    """Forget all programs (``torch._dynamo.reset()`` does this)."""
    with _lock:
        _programs.clear()
