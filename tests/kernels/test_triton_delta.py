"""The Triton kernels of the delta rule and of diagonal plus low rank: interpreted or on a GPU, and compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mstc.kernels.delta_rule.reference import reference
from mstc.kernels.dplr.reference import reference as dplr_reference
from testkit.versions import BEFORE_TRITON_3_9, NEEDS_INTERPRETER

pytest.importorskip("triton")

NATIVE = torch.cuda.is_available()
DEVICE = "cuda" if NATIVE else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Compare = Callable[..., None]
needs_a_way_to_run = pytest.mark.skipif(not (NATIVE or INTERPRETED), reason="needs TRITON_INTERPRET=1 or a GPU")
HALF = torch.bfloat16 if NATIVE else torch.float16
"""The interpreter multiplies bfloat16 as the integers that hold it, so that is for a GPU."""
slow = pytest.mark.slow
QUICK = [(1, "token"), (65, "extreme")]
ALL = [(n, decay) for n in (1, 15, 63, 64, 65, 1000) for decay in ("none", "token", "extreme")]
CASES = [*QUICK, *(pytest.param(*case, marks=slow) for case in ALL if case not in QUICK)]


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


def delta_form(offsets: Tensor | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernels as a differentiable form, on whatever device the tensors are."""
    from mstc.kernels.delta_rule import triton as kernels

    class Form(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, decay, beta, state):  # type: ignore[no-untyped-def]
            out, final, kept = kernels.forward(q, k, v, decay, beta, state, offsets, q.shape[-1] ** -0.5)
            ctx.save_for_backward(q, k, v, decay, beta, kept)
            ctx.set_materialize_grads(False)
            return out, final

        @staticmethod
        def backward(ctx, do, df):  # type: ignore[no-untyped-def]
            q, k, v, decay, beta, kept = ctx.saved_tensors
            dq, dk, dv, dg, dbeta, ds = kernels.backward(
                do, df, q, k, v, decay, beta, kept, offsets, q.shape[-1] ** -0.5
            )
            return dq, dk, dv, None if decay is None else dg, dbeta, ds if ctx.needs_input_grad[5] else None

    return lambda q, k, v, beta, initial_state=None, decay=None: Form.apply(q, k, v, decay, beta, initial_state)


def exact(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, initial_state: Tensor | None = None, decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return reference(q, k, v, decay, beta, initial_state, q.shape[-1] ** -0.5)


def dplr_form(offsets: Tensor | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    """The kernels of diagonal plus low rank as a differentiable form."""
    from mstc.kernels.dplr import triton as kernels

    class Form(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, a, b, decay, state):  # type: ignore[no-untyped-def]
            out, final, kept = kernels.forward(q, k, v, a, b, decay, state, offsets, q.shape[-1] ** -0.5)
            ctx.save_for_backward(q, k, v, a, b, decay, kept)
            ctx.set_materialize_grads(False)
            return out, final

        @staticmethod
        def backward(ctx, do, df):  # type: ignore[no-untyped-def]
            *operands, kept = ctx.saved_tensors
            *grads, ds = kernels.backward(do, df, *operands, kept, offsets, operands[0].shape[-1] ** -0.5)
            return *grads, ds if ctx.needs_input_grad[6] else None

    return lambda q, k, v, a, b, decay, initial_state=None: Form.apply(q, k, v, a, b, decay, initial_state)


def dplr_exact(initial_state: Tensor | None = None, **tensors: Tensor) -> tuple[Tensor, Tensor]:
    return dplr_reference(**tensors, initial_state=initial_state, scale=tensors["q"].shape[-1] ** -0.5)


def packed(exact: Callable[..., tuple[Tensor, Tensor]], offsets: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """A recurrence, document by document."""

    def run(initial_state: Tensor, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        outs, states = [], []
        for i, (start, stop) in enumerate(pairwise(offsets.tolist())):
            state = initial_state[i : i + 1]
            if start < stop:
                o, state = exact(**{n: t[:, start:stop] for n, t in tensors.items()}, initial_state=state)
                outs.append(o)
            states.append(state)
        return torch.cat(outs, 1), torch.cat(states)

    return run


def make(
    length: int,
    decay: str,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 1,
    key: int = 20,
    value: int = 33,
) -> dict[str, Tensor]:
    """Inputs; decay "extreme": log decays of 0, -0.1 and -20 mixed."""
    q, k, v = (torch.randn(batch, length, heads, w) for w in (key, key, value))
    inputs = {"q": q.to(dtype), "k": normalize(k, dim=-1).to(dtype), "v": v.to(dtype)}
    inputs["beta"] = 2 * torch.rand(batch, length, heads)
    inputs["initial_state"] = torch.randn(batch, heads, key, value)
    if decay != "none":
        mixed = torch.tensor([0.0, -20.0, -0.1])[torch.randint(3, (batch, length, heads))]
        inputs["decay"] = mixed if decay == "extreme" else -torch.rand(batch, length, heads)
    return {n: t.to(DEVICE) for n, t in inputs.items()}


def make_dplr(
    length: int,
    extreme: bool = True,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 1,
    key: int = 16,
    value: int = 17,
) -> dict[str, Tensor]:
    """Inputs as RWKV7 makes them; extreme: log decays of 0, -0.1 and -20 mixed."""
    q, k, a = (torch.randn(batch, length, heads, key) for _ in range(3))
    inputs = {"q": q, "k": normalize(k, dim=-1), "v": torch.randn(batch, length, heads, value)}
    inputs["a"] = -normalize(a, dim=-1)
    inputs["b"] = -inputs["a"] * torch.rand(batch, length, heads, key)
    inputs = {n: t.to(dtype) for n, t in inputs.items()}
    mixed = torch.tensor([0.0, -20.0, -0.1])[torch.randint(3, (batch, length, heads, key))]
    inputs["decay"] = mixed if extreme else -torch.rand(batch, length, heads, key)
    inputs["initial_state"] = torch.randn(batch, heads, key, value)
    return {n: t.to(DEVICE) for n, t in inputs.items()}


@needs_a_way_to_run
@pytest.mark.parametrize(("length", "decay"), CASES)
def test_delta_rule(length: int, decay: str, compare: Compare) -> None:
    compare(delta_form(), exact, make(length, decay))


@needs_a_way_to_run
@pytest.mark.parametrize("decay", [pytest.param("none", marks=slow), "token"])
def test_delta_rule_in_half_precision(decay: str, compare: Compare) -> None:
    compare(delta_form(), exact, make(65, decay, HALF))


@needs_a_way_to_run
@pytest.mark.parametrize(("key", "value"), [(1, 1), (100, 8), pytest.param(256, 256, marks=slow)])
def test_delta_rule_widths(key: int, value: int, compare: Compare) -> None:
    compare(delta_form(), exact, make(20, "token", key=key, value=value))


@needs_a_way_to_run
def test_delta_rule_of_packed_documents(compare: Compare) -> None:
    offsets = torch.tensor([0, 5, 5, 70], device=DEVICE)
    inputs = make(70, "token")
    inputs["initial_state"] = torch.randn(3, *inputs["initial_state"].shape[1:], device=DEVICE)
    compare(delta_form(offsets), packed(exact, offsets), inputs)


@needs_a_way_to_run
def test_delta_rule_of_a_batch_without_states(compare: Compare) -> None:
    """Two sequences, no initial state, and no gradient from the final state."""
    inputs = make(17, "token", batch=2, heads=2)
    del inputs["initial_state"]
    compare(lambda **i: delta_form()(**i)[:1], lambda **i: exact(**i)[:1], inputs)


DPLR_CASES = [(65, True), *(pytest.param(n, n != 63, marks=slow) for n in (1, 15, 63, 64, 1000))]


@needs_a_way_to_run
@pytest.mark.parametrize(("length", "extreme"), DPLR_CASES)
def test_dplr(length: int, extreme: bool, compare: Compare) -> None:
    compare(dplr_form(), dplr_exact, make_dplr(length, extreme))


@needs_a_way_to_run
def test_dplr_in_half_precision(compare: Compare) -> None:
    compare(dplr_form(), dplr_exact, make_dplr(33, False, HALF, key=20, value=33))


@needs_a_way_to_run
@pytest.mark.slow
@pytest.mark.parametrize(("key", "value"), [(1, 1), (20, 33), (100, 8), (256, 256)])
def test_dplr_widths(key: int, value: int, compare: Compare) -> None:
    compare(dplr_form(), dplr_exact, make_dplr(20, False, key=key, value=value))


@needs_a_way_to_run
def test_dplr_of_packed_documents(compare: Compare) -> None:
    offsets = torch.tensor([0, 5, 5, 70], device=DEVICE)
    inputs = make_dplr(70)
    inputs["initial_state"] = torch.randn(3, *inputs["initial_state"].shape[1:], device=DEVICE)
    compare(dplr_form(offsets), packed(dplr_exact, offsets), inputs)


@needs_a_way_to_run
def test_dplr_of_a_batch_without_states(compare: Compare) -> None:
    inputs = make_dplr(3, False, batch=2, heads=2)
    del inputs["initial_state"]
    compare(lambda **i: dplr_form()(**i)[:1], lambda **i: dplr_exact(**i)[:1], inputs)


def make_vector_delta(length: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Inputs of the delta rule with a decay over K."""
    inputs = make(length, "none", dtype, key=16)
    decay = torch.tensor([0.0, -20.0, -0.1])[torch.randint(3, inputs["q"].shape)]
    return {**inputs, "decay": decay.to(DEVICE)}


@needs_a_way_to_run
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_delta_rule_with_a_decay_over_keys(dtype: torch.dtype, compare: Compare) -> None:
    compare(delta_form(), exact, make_vector_delta(65, dtype))


@needs_a_way_to_run
@pytest.mark.parametrize("kind", ["delta", "gated delta", "vector delta", "dplr"])
def test_the_ops_run_the_kernels(kind: str, compare: Compare, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decay over K in the delta rule too."""
    from mstc.kernels.api import dplr_attention, linear_attention
    from mstc.kernels.common import recurrence

    monkeypatch.setattr(recurrence, "triton_form", lambda q, name: import_module(f"mstc.kernels.{name}.triton"))
    monkeypatch.setattr(recurrence, "run_forward", None)
    monkeypatch.setattr(recurrence, "run_backward", None)
    inputs = {
        "delta": lambda: make(5, "none"),
        "gated delta": lambda: make(5, "token"),
        "vector delta": lambda: make_vector_delta(20),
        "dplr": lambda: make_dplr(5),
    }[kind]()
    form, wanted = (dplr_attention, dplr_exact) if kind == "dplr" else (linear_attention, exact)
    compare(lambda **i: form(**i, output_final_state=True), wanted, inputs)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize(
    "name",
    ["delta_rule/inverse", "delta_rule/states wide", "delta_rule/adjoints", "delta_rule/solve", "dplr/walk wide"],
)
def test_compiles_ahead_of_time(name: str) -> None:
    from mstc.kernels.aot import compile_one

    row = compile_one(name, "bf16", "sm_90")
    assert row.fits, row
    assert BEFORE_TRITON_3_9 or row.spills == 0, row
