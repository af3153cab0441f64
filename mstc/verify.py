"""``options={"verify": True}``: hold each pass's graph against the one before it, on the first call.

Outputs and the gradients of all inputs are compared, on the call's own inputs, with the same random
numbers and random incoming gradients. The first pass that differs is named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from mstc.errors import VerificationError
from mstc.graph.copies import copy_of
from mstc.passes.base import Pass
from mstc.pipeline import Ran

# Largest relative error that rounding explains, by the coarsest precision in the graph.
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


# Names of passes with the graphs after them; "" with the graph before the first.
Copies = Sequence[tuple[str, fx.GraphModule]]


class Copying:
    """Copies the graph before the passes and after each one that changed it; a watcher of `mstc.pipeline.run`."""

    def __init__(self) -> None:
        self.copies: list[tuple[str, fx.GraphModule]] = []

    def start(self, gm: fx.GraphModule) -> None:
        self.copies.append(("", copy_of(gm)[0]))

    def ran(self, step: Pass, gm: fx.GraphModule, done: Ran) -> None:
        if done.changed:
            self.copies.append((step.name, copy_of(gm)[0]))


def verifying(compiled: Callable[..., Any], copies: Copies, dropped: Sequence[int]) -> Callable[..., Any]:
    """``compiled``, which first holds the copies against each other.

    dropped: positions of outputs that were dropped as unused, which are not compared.
    Raises `VerificationError` at the first call.
    """
    pending = [True]

    def run(*inputs: Any) -> Any:
        if pending:
            pending.clear()
            verify(copies, inputs, frozenset(dropped))
        return compiled(*inputs)

    return run


def verify(copies: Copies, inputs: Sequence[Any], dropped: frozenset[int]) -> None:
    """Compare the graphs one after another. Raises `VerificationError` naming the first pass that differs."""
    state = torch.random.get_rng_state()
    before = _evaluate(copies[0][1], inputs)
    bound = _bound(copies[0][1])
    for name, gm in copies[1:]:
        after = _evaluate(gm, inputs)
        for what, (index, a, b) in _pairs(before, after):
            if what == "output" and index in dropped:
                continue
            error = _error(a, b)
            if not error <= bound:
                raise VerificationError(
                    f"pass {name} changed {what} {index}: relative error {error:.3g}, where rounding explains "
                    f"{bound:.0e}; switch it off with options={{{name!r}: False}} and report the model"
                )
        before = after
    torch.random.set_rng_state(state)


Values = dict[str, list[Any]]


def _evaluate(gm: fx.GraphModule, inputs: Sequence[Any]) -> Values:
    """Outputs of a graph and the gradients of its inputs, with random numbers from one seed."""
    torch.manual_seed(0)
    leaves = [_leaf(x) for x in inputs]
    outputs = list(gm(*leaves))
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    differentiable = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    torch.manual_seed(1)
    incoming = [torch.randn_like(o) for o in differentiable]
    gradients: Sequence[Any] = ()
    if wanted and differentiable:
        gradients = torch.autograd.grad(differentiable, wanted, incoming, allow_unused=True)
    return {"output": [o.detach() if isinstance(o, torch.Tensor) else o for o in outputs], "gradient": list(gradients)}


def _leaf(x: Any) -> Any:
    if not isinstance(x, torch.Tensor):
        return x
    return x.detach().clone().requires_grad_(x.requires_grad)


def _pairs(before: Values, after: Values) -> Any:
    for what in ("output", "gradient"):
        for index, (a, b) in enumerate(zip(before[what], after[what], strict=True)):
            if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
                yield what, (index, a, b)


def _error(a: torch.Tensor | None, b: torch.Tensor | None) -> float:
    if a is None or b is None:
        present = a if a is not None else b
        return 0.0 if present is None or not present.count_nonzero() else float("inf")
    if a.shape != b.shape:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if torch.equal(a, b) else float("inf")
    x, y = a.double(), b.double()
    if not torch.equal(torch.isnan(x), torch.isnan(y)):
        return float("inf")
    x, y = x.nan_to_num(), y.nan_to_num()
    scale = max(x.norm().item(), torch.finfo(a.dtype).eps * x.numel() ** 0.5)
    return float((x - y).norm().item() / scale)


def _bound(gm: fx.GraphModule) -> float:
    """By the coarsest precision in which the graph computes anywhere."""
    values = [n.meta.get("val") for n in gm.graph.nodes]
    return max((BOUNDS.get(v.dtype, 0.0) for v in values if isinstance(v, torch.Tensor)), default=0.0)
