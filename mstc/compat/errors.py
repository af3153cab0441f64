"""What was raised while Dynamo traced, without the wrapping and the log that PyTorch puts around it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException, TorchRuntimeError

__all__ = ["quiet_tracing", "raised_by_backend", "unwrapped"]


def unwrapped(error: Exception) -> BaseException:
    """What the backend, or an op on fake tensors, raised."""
    if isinstance(error, BackendCompilerFailed):
        return error.inner_exception
    inner: BaseException = error
    while isinstance(error, TorchRuntimeError) and isinstance(inner, TorchDynamoException):
        inner = inner.__cause__ or inner.__context__ or RuntimeError(str(inner))
    return inner


def raised_by_backend(error: Exception) -> bool:
    return isinstance(error, BackendCompilerFailed)


@contextmanager
def quiet_tracing() -> Iterator[None]:
    """Without the traceback that fake tensors log for each op that raises."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)
