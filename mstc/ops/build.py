"""From a region to a registered loop program: trace its bodies, compile them once per distinct body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.regions import Region
from mstc.graph.text import canonical_text, digest
from mstc.ops import program as programs
from mstc.ops.body import BackwardBody, Value, backward_body, flops_of, forward_body
from mstc.ops.pieces import balanced
from mstc.ops.program import Backward, Program

Compiler = Callable[[fx.GraphModule, Sequence[torch.Tensor]], Callable[..., Any]]


@dataclass(frozen=True)
class Recipe:
    """How a region is to run.

    count: number of chunks; training: whether gradients are recorded; kept: for each output, whether it
    is kept anyway; loss: gradients are computed in the forward; accumulate: see `Program`;
    mode: whatever else tells bodies apart (lowering, determinism).
    """

    count: int
    training: bool
    kept: tuple[bool, ...]
    loss: bool
    accumulate: str
    mode: str
    label: str


def build(region: Region, recipe: Recipe, compiler: Compiler) -> Program:
    """The loop program of a region; identical regions share one, compiled at its first use."""
    tokens = tuple(Value.of(n, p) for n, p in region.tokens)
    shared = tuple(Value.of(n, None) for n in region.shared)
    outputs = tuple(Value.of(n, p) for n, p in region.outputs)
    sums = tuple(Value.of(n, None) for n in region.sums)
    token_needs = tuple(recipe.training and bool(n.meta.get("needs_grad")) for n, _ in region.tokens)
    shared_needs = tuple(recipe.training and bool(n.meta.get("needs_grad")) for n in region.shared)
    result_needs = tuple(
        recipe.training and bool(n.meta.get("needs_grad")) for n in (*(n for n, _ in region.outputs), *region.sums)
    )
    n = int(region.n)
    lengths = sorted({length for _, length in balanced(n, recipe.count)}, reverse=True)
    body = forward_body(region, lengths[0])
    key = "mstc_" + digest(
        canonical_text(body.graph), tokens, shared, outputs, sums, token_needs, shared_needs, result_needs, n, recipe
    )
    if programs.known(key):
        return programs.program(key)
    differentiable = any(result_needs) and (any(token_needs) or any(shared_needs))
    forward: dict[int, Callable[..., Any]] = {}
    backward: dict[int, Callable[..., Any]] = {}
    traced: BackwardBody | None = None
    flops = (0.0, 0.0)
    for length in lengths:
        mode = compat.FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [v.fake(mode, length) for v in (*tokens, *shared)]
        body = forward_body(region, length)
        with compat.isolated_tracing(mode):
            # As the loop reads and writes them: dense, whatever views the body returns.
            results = [v.fake(mode, length) for v in (*outputs, *sums)]
            if differentiable:
                traced = backward_body(
                    body,
                    fakes[: len(tokens)],
                    fakes[len(tokens) :],
                    token_needs,
                    shared_needs,
                    results,
                    result_needs,
                    recipe.kept,
                    with_values=recipe.loss,
                )
                flops = (flops[0], flops_of(traced.gm) * recipe.count)
        if not (recipe.loss and differentiable):
            forward[length] = compiler(body, fakes)
        if traced is not None:
            laid_out = [v.fake(mode, length) for v in (*outputs, *sums)]
            backward[length] = compiler(traced.gm, _inputs(traced, fakes, laid_out, len(tokens)))
    made = Program(
        key,
        recipe.label,
        n,
        recipe.count,
        tokens,
        shared,
        outputs,
        sums,
        token_needs,
        shared_needs,
        forward,
        _backward(traced, backward) if traced is not None else None,
        recipe.accumulate,
        *flops,
    )
    programs.register(made)
    return made


def _inputs(
    traced: BackwardBody, fakes: Sequence[torch.Tensor], results: Sequence[torch.Tensor], n_tokens: int
) -> list[torch.Tensor]:
    return [
        *(fakes[i] for i in traced.tokens),
        *(fakes[n_tokens + j] for j in traced.shared),
        *(results[i] for i in traced.kept),
        *(results[i] for i in traced.grads),
    ]


def _backward(traced: BackwardBody, run: dict[int, Callable[..., Any]]) -> Backward:
    return Backward(
        run,
        traced.tokens,
        traced.shared,
        traced.kept,
        traced.grads,
        traced.token_grads,
        traced.shared_grads,
        traced.factors,
        traced.values,
    )
