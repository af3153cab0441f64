"""Fake tensors: shapes and dtypes without memory, and the mode under which a graph is evaluated on them.

The classes are private, as is the tracing context in which Dynamo keeps the mode of the running compilation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, fake_tensor_tls

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "beside_real_tensors",
    "fake_inputs",
    "fake_mode_of",
    "fake_mode_of_values",
    "isolated_tracing",
    "symbolic_kernels",
]


def fake_mode_of(values: Sequence[object]) -> FakeTensorMode:
    """The fake mode of the running compilation, or that of the first fake tensor in ``values``."""
    context = TracingContext.try_get()
    if context is not None and context.fake_mode is not None:
        return context.fake_mode
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_mode_of_values(values: Sequence[object]) -> FakeTensorMode:
    """The fake mode of the first fake tensor in ``values``, whatever compilation is running."""
    return next(v.fake_mode for v in values if isinstance(v, FakeTensor))


def fake_inputs(placeholders: Sequence[fx.Node], inputs: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """Fake versions of a backend's example inputs.

    A backend gets real tensors, but fake ones under DDP's optimizer. The tracing context's
    symbolic context and source go along: without them new symbols and guards would appear.
    """
    context = TracingContext.try_get()
    fakes: list[Any] = []
    for node, value in zip(placeholders, inputs, strict=True):
        if isinstance(value, FakeTensor) and value.fake_mode is mode:
            fakes.append(value)
        elif isinstance(value, torch.Tensor):
            symbolic = context.tensor_to_context.get(value) if context is not None else None  # type: ignore[no-untyped-call]
            source = symbolic.tensor_source if symbolic is not None else None
            fakes.append(mode.from_tensor(value, symbolic_context=symbolic, source=source, trace=False))
        else:
            fakes.append(node.meta.get("example_value", value))
    return fakes


@contextlib.contextmanager
def beside_real_tensors() -> Iterator[None]:
    """Let fake tensors meet real ones: what a model makes of numbers (a list as an index) while Dynamo traces it on the
    meta device stays real, and only this switch of the thread lets it through."""
    before = fake_tensor_tls.allow_non_fake_inputs_override
    fake_tensor_tls.allow_non_fake_inputs_override = True
    try:
        yield
    finally:
        fake_tensor_tls.allow_non_fake_inputs_override = before


def symbolic_kernels(mode: FakeTensorMode) -> contextlib.AbstractContextManager[Any]:
    """Let ops run by PyTorch's Python versions of them, as AOTAutograd does where lengths may be symbolic.

    Some of the C++ ones ask for numbers: `constant_pad_nd` with negative padding, the derivative of padding too.
    """
    return enable_python_dispatcher() if mode.shape_env is not None else contextlib.nullcontext()


@contextlib.contextmanager
def isolated_tracing(mode: FakeTensorMode | None = None) -> Iterator[None]:
    """A tracing context of its own, so that compiling a body inside a backend leaves the outer one alone."""
    with tracing(TracingContext(mode) if mode is not None else None):
        yield
