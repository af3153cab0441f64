"""What compiling waits for: C++ kernels, for which Inductor waits where only private names reach, and garbage."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator
from typing import Any

from torch._dynamo import compiled_autograd
from torch._functorch import config as functorch_config
from torch._inductor.async_compile import AsyncCompile

__all__ = ["built_together", "old_objects_set_aside"]


@contextlib.contextmanager
def built_together() -> Iterator[None]:
    """Have what this thread compiles meanwhile wait for its C++ kernels at the end of the block, all at once.

    The module that Inductor writes for a graph hands its kernels to compiler processes and, as its last line, waits
    for them (``AsyncCompile.wait``); there is no public way to wait later. The bodies of the loops are many small
    graphs: while the kernels of one are built, the next can be lowered. Nothing that was compiled may run before
    the block ends. So that the backward's kernels are built together with the others, it is compiled with the
    forward and not on its first call, unless compiled autograd is to compile it.
    """
    waiting: list[tuple[AsyncCompile, dict[str, Any]]] = []
    plain, thread = AsyncCompile.wait, threading.get_ident()

    def later(compiler: AsyncCompile, scope: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            waiting.append((compiler, scope))
        else:
            plain(compiler, scope)

    AsyncCompile.wait = later  # type: ignore[assignment, method-assign]
    try:
        with functorch_config.patch(force_non_lazy_backward_lowering=not compiled_autograd.compiled_autograd_enabled):
            yield
    finally:
        AsyncCompile.wait = plain  # type: ignore[method-assign]
        for compiler, scope in waiting:
            plain(compiler, scope)


@contextlib.contextmanager
def old_objects_set_aside() -> Iterator[None]:
    """Have the garbage collector walk nothing but what is made in the block.

    Compiling makes so many objects that every few seconds all of the process is walked for garbage, a tenth of the
    time in total. What was there before stays there; where somebody froze objects of their own, nothing is done.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
