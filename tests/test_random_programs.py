"""Random programs stay equal, forward and every gradient, for random chunk sizes.

The graph is built as Dynamo would hand it over and goes through the same steps as in the backend; Dynamo itself is
left out, so that many programs fit in a test run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mstc.graph.normal_form import normalize
from mstc.lower import body_compiler
from mstc.ops import program as programs
from mstc.options import parse_options
from mstc.passes.base import Context
from mstc.pipeline import run
from mstc.report import Report
from testkit.exactness import BOUNDS, chunked, gradient_errors, loops_of
from testkit.programs import random_program

BOUND = BOUNDS[torch.float64]
ALL_CHECKS = list(HealthCheck)


def rewrite(gm: fx.GraphModule, inputs: Sequence[Any], options: dict[str, Any]) -> fx.GraphModule:
    """What the backend does before it lowers."""
    chosen = parse_options(options)
    form = normalize(gm, inputs)
    run(form.gm, Context(chosen, form.training, compile_body=body_compiler(chosen.lower)), Report())
    return form.gm


def outcome(run_it: Callable[..., Any], inputs: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor | None]:
    """Results, and gradients of a random combination of them, by name."""
    for x in inputs:
        x.grad = None
    results = run_it(*inputs)
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros((), dtype=torch.float64)
    for r in results:
        if r.requires_grad:
            total = total + (r * torch.randn(r.shape, dtype=r.dtype, generator=generator)).sum()
    if total.requires_grad:
        total.backward()
    found: dict[str, Tensor | None] = {f"grad of {n}": x.grad for n, x in zip(names, inputs, strict=True)}
    return found | {f"result {i}": r.detach() for i, r in enumerate(results)}


def check_equal(got: dict[str, Tensor | None], expected: dict[str, Tensor | None], shown: str) -> None:
    for group in ("grad", "result"):
        a = {n: v for n, v in got.items() if n.startswith(group)}
        b = {n: v for n, v in expected.items() if n.startswith(group)}
        # By symmetry all gradients of a program can be zero: then 1e-13 is all that double precision can tell.
        for name, error in gradient_errors(a, b, least=1e-4).items():
            assert error <= BOUND, f"{name} differs by {error:.2e}\n{shown}"
    for name, value in expected.items():
        other = got[name]
        zero = value if other is None else other if value is None else torch.zeros(())
        assert zero is None or not zero.any(), f"{name} is there on one side only\n{shown}"


def check_one(data: st.DataObject, lower: str) -> int:
    gm, p = random_program(data.draw)
    tokens = p.B * p.S
    head = data.draw(st.sampled_from((False, True, 1, 3, tokens)), label="lm_head")
    options = {
        "lower": lower,
        "mini_sequence": {"chunk_tokens": data.draw(st.integers(1, tokens), label="mini_sequence")},
        "lm_head": head if isinstance(head, bool) else {"chunk_tokens": head},
        "recompute": data.draw(st.booleans(), label="recompute"),
    }
    expected = outcome(gm.forward, p.inputs, p.names)
    rewritten = rewrite(gm, p.inputs, options)
    got = outcome(rewritten.forward, p.inputs, p.names)
    check_equal(got, expected, f"{options}\n{gm.code}\n{rewritten.code}")
    programs.clear()
    return len(loops_of(rewritten))


def fuzz(examples: int, lower: str, derandomize: bool) -> list[int]:
    loops: list[int] = []

    @settings(max_examples=examples, deadline=None, derandomize=derandomize, suppress_health_check=ALL_CHECKS)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        loops.append(check_one(data, lower))

    check()
    return loops


def test_random_programs_stay_equal() -> None:
    loops = fuzz(80, "eager", derandomize=True)
    assert sum(n > 0 for n in loops) > 40, "too few programs had a loop to say anything"


@pytest.mark.slow
def test_many_random_programs_stay_equal() -> None:
    """Other programs in every run."""
    fuzz(10_000, "eager", derandomize=False)


def test_random_programs_through_the_whole_backend() -> None:
    """The same through `torch.compile`, AOTAutograd included."""

    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=ALL_CHECKS)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        gm, p = random_program(data.draw)
        torch._dynamo.reset()
        chunk = data.draw(st.integers(1, p.B * p.S), label="chunk_tokens")
        options = chunked(chunk, chunk, "aot_eager")
        compiled = torch.compile(gm.forward, backend="mstc", options=options)
        check_equal(outcome(compiled, p.inputs, p.names), outcome(gm.forward, p.inputs, p.names), gm.code)

    check()
