"""The Triton kernels: in Triton's interpreter on a CPU, natively on a GPU, and compiled for their targets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from testkit.versions import NEEDS_INTERPRETER

pytest.importorskip("triton")

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Compare = Callable[..., None]
needs_a_way_to_run = pytest.mark.skipif(not (NATIVE or INTERPRETED), reason="needs TRITON_INTERPRET=1 or a GPU")


@NEEDS_INTERPRETER
def test_in_the_interpreter() -> None:
    """Triton reads TRITON_INTERPRET when it is imported, so the tests below run in a process of their own."""
    if NATIVE or INTERPRETED:
        pytest.skip("this process runs the kernels itself")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def scalar_form(**given: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels as a differentiable form, on whatever device the tensors are."""
    from mstc.kernels.scalar_decay import triton as kernels

    offsets = given.pop("cu_seqlens", None)
    decay = given.get("decay")

    class Form(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, decay, state):  # type: ignore[no-untyped-def]
            out, final, kept = kernels.forward(q, k, v, decay, state, offsets, q.shape[-1] ** -0.5)
            ctx.save_for_backward(q, k, v, decay, kept)
            return out, final

        @staticmethod
        def backward(ctx, do, df):  # type: ignore[no-untyped-def]
            q, k, v, decay, kept = ctx.saved_tensors
            grads = kernels.backward(do, df, q, k, v, decay, kept, offsets, q.shape[-1] ** -0.5)
            return *grads[:3], None if decay is None else grads[3], grads[4]

    return Form.apply(given["q"], given["k"], given["v"], decay, given["initial_state"])  # type: ignore[no-any-return]


def make(
    length: int, decay: str, dtype: torch.dtype, batch: int = 1, heads: int = 1, key: int = 20, value: int = 33
) -> dict[str, Tensor]:
    inputs = {n: torch.randn(batch, length, heads, w).to(dtype) for n, w in (("q", key), ("k", key), ("v", value))}
    if decay != "none":
        shape = (batch, length, heads)
        mixed = torch.tensor([0.0, -20.0, -0.1])[torch.randint(3, shape)]
        inputs["decay"] = mixed if decay == "extreme" else -torch.rand(shape)
    inputs["initial_state"] = torch.randn(batch, heads, key, value)
    return {n: t.to(DEVICE) for n, t in inputs.items()}


def exact(q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor, decay: Tensor | None = None) -> tuple[Tensor, Tensor]:
    from mstc.kernels.scalar_decay.reference import reference

    return reference(q, k, v, decay, initial_state, q.shape[-1] ** -0.5)


@needs_a_way_to_run
@pytest.mark.parametrize("decay", ["none", "token", "extreme"])
@pytest.mark.parametrize(
    "length", [1, 65, pytest.param(15, marks=pytest.mark.slow), pytest.param(1000, marks=pytest.mark.slow)]
)
def test_scalar_decay(length: int, decay: str, compare: Compare) -> None:
    compare(scalar_form, exact, make(length, decay, torch.float32))


@needs_a_way_to_run
@pytest.mark.parametrize("decay", ["none", "token"])
def test_scalar_decay_in_half_precision(decay: str, compare: Compare) -> None:
    """float16: the interpreter multiplies bfloat16 as the integers that hold it, so that is for a GPU."""
    compare(scalar_form, exact, make(65, decay, torch.bfloat16 if NATIVE else torch.float16))


@needs_a_way_to_run
@pytest.mark.parametrize(("key", "value"), [(1, 1), (100, 8), pytest.param(256, 256, marks=pytest.mark.slow)])
def test_scalar_decay_widths(key: int, value: int, compare: Compare) -> None:
    compare(scalar_form, exact, make(20, "token", torch.float32, heads=2, key=key, value=value))


@needs_a_way_to_run
def test_scalar_decay_of_packed_documents(compare: Compare) -> None:
    from mstc.kernels.api import linear_attention

    offsets = torch.tensor([0, 5, 5, 69, 75], device=DEVICE)
    inputs = make(75, "token", torch.float32)
    inputs["initial_state"] = torch.randn(4, *inputs["initial_state"].shape[1:], device=DEVICE)
    wanted = lambda **i: linear_attention(**i, output_final_state=True, cu_seqlens=offsets)  # noqa: E731
    compare(lambda **i: scalar_form(**i, cu_seqlens=offsets), wanted, inputs)


def vector_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The kernels of the decay over K as a differentiable form."""
    from mstc.kernels.vector_decay import triton as kernels

    scale = q.shape[-1] ** -0.5

    class Form(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, decay, bonus, state):  # type: ignore[no-untyped-def]
            out, final, kept = kernels.forward(q, k, v, decay, bonus, state, cu_seqlens, scale)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(q, k, v, decay, bonus, kept)
            return out, final

        @staticmethod
        def backward(ctx, do, df):  # type: ignore[no-untyped-def]
            *operands, kept = ctx.saved_tensors
            *grads, du, ds = kernels.backward(do, df, *operands, kept, cu_seqlens, scale)
            return *grads, None if operands[4] is None else du, None if initial_state is None else ds

    return Form.apply(q, k, v, decay, bonus, initial_state)  # type: ignore[no-any-return]


def vector_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from mstc.kernels.vector_decay.reference import reference

    return reference(q, k, v, decay, bonus, initial_state, q.shape[-1] ** -0.5)


def make_vector(
    length: int,
    bonus: bool,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 1,
    key: int = 20,
    value: int = 33,
) -> dict[str, Tensor]:
    """Log decays of 0, -0.1 and -20 mixed."""
    inputs = {n: torch.randn(batch, length, heads, w).to(dtype) for n, w in (("q", key), ("k", key), ("v", value))}
    inputs["decay"] = torch.tensor([0.0, -20.0, -0.1])[torch.randint(3, (batch, length, heads, key))]
    if bonus:
        inputs["bonus"] = torch.randn(heads, key)
    inputs["initial_state"] = torch.randn(batch, heads, key, value)
    return {n: t.to(DEVICE) for n, t in inputs.items()}


@needs_a_way_to_run
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("length", [1, 65, *(pytest.param(n, marks=pytest.mark.slow) for n in (15, 63, 64, 1000))])
def test_vector_decay(length: int, bonus: bool, compare: Compare) -> None:
    compare(vector_form, vector_exact, make_vector(length, bonus))


@needs_a_way_to_run
@pytest.mark.parametrize(
    "level", [-0.01, pytest.param(-1.0, marks=pytest.mark.slow), pytest.param(-20.0, marks=pytest.mark.slow)]
)
def test_vector_decay_of_one_strength(level: float, compare: Compare) -> None:
    """Where every decay is weak, all pairs of a chunk count; where all are strong, gradients of g are tiny."""
    inputs = make_vector(64, True, key=16)
    compare(vector_form, vector_exact, {**inputs, "decay": level * (0.5 + torch.rand_like(inputs["decay"]))})


@needs_a_way_to_run
def test_vector_decay_of_batches_without_states(compare: Compare) -> None:
    inputs = make_vector(20, True, batch=2, heads=2, key=16)
    del inputs["initial_state"]
    compare(lambda **i: vector_form(**i)[:1], lambda **i: vector_exact(**i)[:1], inputs)


@needs_a_way_to_run
@pytest.mark.parametrize("bonus", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_vector_decay_in_half_precision(bonus: bool, compare: Compare) -> None:
    compare(vector_form, vector_exact, make_vector(33, bonus, torch.bfloat16 if NATIVE else torch.float16, key=16))


@needs_a_way_to_run
@pytest.mark.parametrize(
    ("key", "value"),
    [(1, 1), (40, 70), pytest.param(100, 8, marks=pytest.mark.slow), pytest.param(256, 256, marks=pytest.mark.slow)],
)
def test_vector_decay_widths(key: int, value: int, compare: Compare) -> None:
    compare(vector_form, vector_exact, make_vector(18, True, key=key, value=value))


@needs_a_way_to_run
@pytest.mark.parametrize("bonus", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_vector_decay_of_packed_documents(bonus: bool, compare: Compare) -> None:
    from mstc.kernels.api import linear_attention

    offsets = torch.tensor([0, 5, 5, 71, 75], device=DEVICE)
    inputs = make_vector(75, bonus, key=16)
    inputs["initial_state"] = torch.randn(4, *inputs["initial_state"].shape[1:], device=DEVICE)
    wanted = lambda **i: linear_attention(**i, output_final_state=True, cu_seqlens=offsets)  # noqa: E731
    compare(lambda **i: vector_form(**i, cu_seqlens=offsets), wanted, inputs)


@needs_a_way_to_run
@pytest.mark.parametrize("bonus", [False, True])
def test_the_op_of_a_vector_decay_runs_the_kernels(
    bonus: bool, compare: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mstc.kernels.api import linear_attention
    from mstc.kernels.common import recurrence
    from mstc.kernels.vector_decay import triton as kernels

    monkeypatch.setattr(recurrence, "triton_form", lambda q, name: kernels)
    monkeypatch.setattr(recurrence, "run_forward", None)
    monkeypatch.setattr(recurrence, "run_backward", None)
    compare(lambda **i: linear_attention(**i, output_final_state=True), vector_exact, make_vector(17, bonus, key=16))


def window_form(window: int, sinks: int, offsets: Tensor | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernels of sliding-window attention as a differentiable form."""
    from mstc.kernels.sliding_window import triton as kernels

    class Form(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):  # type: ignore[no-untyped-def]
            out, lse = kernels.forward(q, k, v, offsets, window, sinks, q.shape[-1] ** -0.5)
            ctx.save_for_backward(q, k, v, out, lse)
            return out, lse

        @staticmethod
        def backward(ctx, do, dl):  # type: ignore[no-untyped-def]
            q, k, v, out, lse = ctx.saved_tensors
            return kernels.backward(do, dl, q, k, v, out, lse, offsets, window, sinks, q.shape[-1] ** -0.5)

    return lambda q, k, v: Form.apply(q, k, v)


@needs_a_way_to_run
@pytest.mark.parametrize(("length", "window", "sinks"), [(1, 1, 0), (15, 7, 0), (65, 64, 4), (100, 10, 70)])
def test_sliding_window(length: int, window: int, sinks: int, compare: Compare) -> None:
    from mstc.kernels.sliding_window.reference import reference

    inputs = {n: t for n, t in make(length, "none", torch.float32).items() if n in ("q", "k", "v")}
    compare(window_form(window, sinks), lambda q, k, v: reference(q, k, v, window, sinks, q.shape[-1] ** -0.5), inputs)


@needs_a_way_to_run
def test_sliding_window_of_packed_documents(compare: Compare) -> None:
    from mstc.kernels.sliding_window.op import sliding_window_attention

    offsets = torch.tensor([0, 3, 3, 70, 90, 90], device=DEVICE)
    inputs = {n: t for n, t in make(90, "none", torch.float32).items() if n in ("q", "k", "v")}
    wanted = lambda **i: sliding_window_attention(  # noqa: E731
        **i, window=40, sinks=5, return_lse=True, cu_seqlens=offsets
    )
    compare(window_form(40, 5, offsets), wanted, inputs)


@needs_a_way_to_run
def test_sliding_window_in_half_precision(compare: Compare) -> None:
    from mstc.kernels.sliding_window.reference import reference

    dtype = torch.bfloat16 if NATIVE else torch.float16
    inputs = {n: t for n, t in make(65, "none", dtype).items() if n in ("q", "k", "v")}
    compare(window_form(20, 3), lambda q, k, v: reference(q, k, v, 20, 3, q.shape[-1] ** -0.5), inputs)


def scan_form(offsets: Tensor | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernels of the selective scan as a differentiable form."""
    from mstc.kernels.selective_scan import triton as kernels

    class Form(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):  # type: ignore[no-untyped-def]
            y, final, kept = kernels.forward(*tensors, offsets)
            ctx.save_for_backward(*tensors[:5], kept)
            return y, final

        @staticmethod
        def backward(ctx, dy, df):  # type: ignore[no-untyped-def]
            return kernels.backward(dy, df, *ctx.saved_tensors, offsets)

    return lambda x, dt, a, b, c, initial_state: Form.apply(x, dt, a, b, c, initial_state)


def scan_inputs(length: int, batch: int, states: int) -> dict[str, Tensor]:
    channels, columns = 12, 5
    inputs = {
        "x": torch.randn(batch, length, channels),
        "dt": torch.rand(batch, length, channels) * torch.randint(2, (batch, length, channels)),
        "a": -20 * torch.rand(channels, columns),
        "b": torch.randn(batch, length, columns),
        "c": torch.randn(batch, length, columns),
        "initial_state": torch.randn(states, channels, columns),
    }
    return {n: t.to(DEVICE) for n, t in inputs.items()}


@needs_a_way_to_run
@pytest.mark.parametrize("length", [1, 65, pytest.param(1000, marks=pytest.mark.slow)])
def test_selective_scan(length: int, compare: Compare) -> None:
    from mstc.kernels.selective_scan.reference import reference

    compare(scan_form(), reference, scan_inputs(length, 1, 1))


@needs_a_way_to_run
def test_selective_scan_of_packed_documents(compare: Compare) -> None:
    from mstc.kernels.selective_scan.op import selective_scan

    offsets = torch.tensor([0, 3, 3, 70], device=DEVICE)

    def wanted(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial_state: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(x, dt, a, b, c, initial_state=initial_state, output_final_state=True, cu_seqlens=offsets)

    compare(scan_form(offsets), wanted, scan_inputs(70, 1, 3))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    "name",
    [
        "scalar_decay/gradients",
        "vector_decay/pairs",
        "vector_decay/pair_gradients",
        "vector_decay/gradients",
        "sliding_window/dkv",
        "selective_scan/gradients",
    ],
)
def test_compiles_ahead_of_time(name: str) -> None:
    from mstc.kernels.aot import compile_one

    row = compile_one(name, "bf16", "sm_90")
    assert row.fits, row


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
def test_every_kernel_fits_every_target() -> None:
    from mstc.kernels.aot import compile_all, to_text

    rows = list(compile_all())
    assert all(row.fits for row in rows), "\n" + to_text(rows)
