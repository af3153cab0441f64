"""What every kernel class is held to: reference against the op, forward and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mstc import compat
from mstc.compat import inductor
from mstc.kernels.common import segments
from mstc.kernels.selective_scan import blocks

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3, torch.float64: 1e-12}
Form = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """One thread, a fixed seed, and NaN in all memory that is allocated and not written."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Bodies that compiled code would have compiled run as they are: (function, shapes, threads) of each."""
    made: list[tuple[Any, ...]] = []

    def compile_for(function: Any, examples: list[Tensor], threads: int | None = None) -> Any:
        made.append((function, [e.shape for e in examples], threads))
        return function

    for where in (compat, inductor):
        for name in ("compile_for", "compile_block"):
            monkeypatch.setattr(where, name, compile_for)
    for clear in (segments._compiled.cache_clear, blocks._compile.cache_clear):
        clear()
    yield made
    for clear in (segments._compiled.cache_clear, blocks._compile.cache_clear):
        clear()


def error_of(got: Tensor, wanted: Tensor) -> float:
    """Relative root mean square error."""
    wanted = wanted.double()
    return float((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def run_with_grads(form: Form, inputs: Mapping[str, Tensor], weights: list[Tensor]) -> dict[str, Tensor]:
    """Outputs of ``form(**inputs)`` and the gradient of each floating input, for the given output gradients."""
    leaves = {n: t.detach().clone().requires_grad_(t.is_floating_point()) for n, t in inputs.items()}
    outputs = form(**leaves)
    loss = sum((o.double() * w).sum() for o, w in zip(outputs, weights, strict=True))
    assert isinstance(loss, Tensor)
    loss.backward()
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            found[f"grad {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return found


@pytest.fixture
def compare() -> Callable[..., None]:
    """compare(form, reference, inputs): the reference runs in float64 on the same (rounded) numbers."""

    def check(form: Form, reference: Form, inputs: Mapping[str, Tensor], tolerance: float | None = None) -> None:
        exact = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
        with torch.no_grad():
            shapes = [o.shape for o in reference(**exact)]
        device = next(iter(inputs.values())).device
        weights = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
        dtype = next(iter(inputs.values())).dtype
        # The incoming gradient of an output is rounded to the output's dtype: give both sides the rounded one.
        weights[0] = weights[0].to(dtype).double()
        weights[1:] = [w.float().double() for w in weights[1:]]
        wanted = run_with_grads(reference, exact, weights)
        got = run_with_grads(form, inputs, weights)
        limit = TOLERANCE[dtype] if tolerance is None else tolerance
        errors = {name: error_of(got[name], wanted[name]) for name in wanted}
        wrong = {name: error for name, error in errors.items() if not error <= limit}
        assert not wrong, f"relative RMSE over {limit}: {wrong}"

    return check
