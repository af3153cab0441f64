"""What watches the caller's autograd sees nothing of the tracing, and the graph is rewritten all the same."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from testkit.exactness import chunked, compare
from testkit.tiny import Tiny, inputs, step


def hooks() -> AbstractContextManager[Any]:
    def real(x: Tensor) -> Tensor:
        assert not isinstance(x, FakeTensor)
        return x.clone()

    return saved_tensors_hooks(real, real)


@pytest.mark.parametrize("around", [hooks, torch.autograd.detect_anomaly], ids=["hooks", "anomaly"])
@pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning")
def test_observed(around: Callable[[], AbstractContextManager[Any]]) -> None:
    """Hooks of saved tensors, and anomaly mode, which asks all gradients for nan."""
    model = Tiny()
    with around():
        result = compare(step(model), dict(model.named_parameters()), inputs(), chunked(7, 5))
    result.check()
    assert result.loops == 3 and len(result.graphs) == 1


def test_a_checkpoint_around_the_compiled_function() -> None:
    """It counts what autograd saves, in the first run and in the second."""
    model, (x, labels) = Tiny(), inputs()
    torch._dynamo.reset()
    expected = torch.autograd.grad(step(model)(x, labels), list(model.parameters()))
    fast = torch.compile(step(model), backend="mstc", options=chunked(7, 5))
    got = torch.autograd.grad(checkpoint(fast, x, labels, use_reentrant=False), list(model.parameters()))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
