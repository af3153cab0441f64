"""What is told of an error that Dynamo wraps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mstc.compat.errors import quiet_tracing, raised_by_backend, unwrapped


def _error(fn: Any, backend: Any, caplog: pytest.LogCaptureFixture) -> Exception:
    torch._dynamo.reset()
    with quiet_tracing(), pytest.raises(Exception) as found:  # noqa: PT011
        torch.compile(fn, backend=backend)(torch.zeros(2, 5))
    assert not caplog.records
    error = found.value
    assert isinstance(error, Exception)
    return error


def test_an_op_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    error = _error(nn.Linear(3, 4), "eager", caplog)
    assert "reduction dim" in str(unwrapped(error)) and "\n" not in str(unwrapped(error))
    assert not raised_by_backend(error)


def test_a_backend_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    def backend(gm: Any, inputs: Any) -> Any:
        raise ZeroDivisionError("in here")

    def fn(x: Tensor) -> Tensor:
        return x + 1

    error = _error(fn, backend, caplog)
    assert raised_by_backend(error) and isinstance(unwrapped(error), ZeroDivisionError)


def test_any_other_error_is_itself() -> None:
    error = KeyError("inner")
    assert unwrapped(error) is error and not raised_by_backend(error)
