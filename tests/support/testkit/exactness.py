"""Eager against mstc: loss and every gradient.

    error of a gradient g against eager's r = |g - r| / max(|r|, rms * sqrt(size of r))

with rms the root mean square of all gradients' elements, since some gradients (a key's bias) are truly zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.fx as fx
from torch import Tensor

import mstc
import mstc.backend
from mstc.graph.costs import is_heavy
from mstc.graph.provenance import source_of
from mstc.report import Report

BOUNDS = {torch.float64: 1e-9, torch.float32: 2e-5}

Gradients = dict[str, Tensor | None]


def of_all_pairs(graph: fx.Graph, length: int) -> list[str]:
    """The values with two dimensions of so many tokens."""
    values = [(n.name, n.meta.get("val")) for n in graph.nodes]
    shapes = [(name, tuple(v.shape)) for name, v in values if isinstance(v, Tensor)]
    return [f"{name} {shape}" for name, shape in shapes if shape.count(length) > 1]


@dataclass
class Comparison:
    """How far mstc is from eager, and what it did.

    loss: error relative to the loss (or to 1 where that is smaller); worst: the largest gradient error, where: of which
    gradient; missing: gradients that only one of the two has; graphs: what was lowered.
    """

    loss: float
    worst: float
    where: str
    missing: list[str]
    reports: list[Report]
    graphs: list[fx.GraphModule] = field(default_factory=list)

    @property
    def loops(self) -> int:
        return sum(len(loops_of(gm)) for gm in self.graphs)

    def of_all_pairs(self, length: int) -> list[str]:
        """The values in the lowered graphs with two dimensions of so many tokens."""
        return [found for gm in self.graphs for found in of_all_pairs(gm.graph, length)]

    def check(self, dtype: torch.dtype = torch.float64) -> None:
        bound = BOUNDS[dtype]
        assert not self.missing, f"gradients on one side only: {self.missing}"
        assert self.loss <= bound, f"loss differs by {self.loss:.2e}\n{self.describe()}"
        assert self.worst <= bound, f"gradient of {self.where} differs by {self.worst:.2e}\n{self.describe()}"

    def describe(self) -> str:
        lines = [f"edit: {e.what}" for r in self.reports for e in r.edits]
        lines += [f"refusal: {x.pass_name} {x.node} {x.source}: {x.reason}" for r in self.reports for x in r.refusals]
        return "\n".join(lines)


def gradient_errors(got: Gradients, reference: Gradients, least: float = 0.0) -> dict[str, float]:
    """The error of each gradient that both sides have; elements that are nan on both sides agree.

    least: the smallest rms to assume, for functions whose gradients may all be zero but for rounding.
    """
    pairs = {}
    for name, r in reference.items():
        g = got.get(name)
        if r is not None and g is not None:
            agreed = r.isnan() & g.isnan()
            pairs[name] = (g.double().masked_fill(agreed, 0), r.double().masked_fill(agreed, 0))
    size = sum(r.numel() for _, r in pairs.values())
    rms = max((sum(r.square().sum().item() for _, r in pairs.values()) / max(size, 1)) ** 0.5, least)
    return {
        name: (g - r).norm().item() / max(r.norm().item(), rms * r.numel() ** 0.5, 1e-300)
        for name, (g, r) in pairs.items()
    }


def gradients_of(
    fn: Callable[..., Any], leaves: Mapping[str, Tensor], inputs: Sequence[Any]
) -> tuple[Tensor, Gradients]:
    """The loss ``fn(*inputs)`` and its gradients, which start from nothing."""
    for leaf in leaves.values():
        leaf.grad = None
    loss = fn(*inputs)
    loss.backward()
    found: Gradients = {name: leaf.grad for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.grad = None
    return loss.detach(), found


@contextlib.contextmanager
def lowered_graphs() -> Iterator[list[fx.GraphModule]]:
    """Collects the graphs that mstc hands to its lowering."""
    seen: list[fx.GraphModule] = []
    lower = mstc.backend.lower

    def spy(gm: fx.GraphModule, *args: Any) -> Any:
        compiled = lower(gm, *args)
        seen.append(gm)  # not before: Dynamo starts anew where the lowering asks for it
        return compiled

    with mock.patch.object(mstc.backend, "lower", spy):
        yield seen


def loops_of(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of a loop op."""
    return [n for n in gm.graph.nodes if str(n.target).startswith(("mstc.loop", "mstc.loss_loop"))]


def products_outside(gm: fx.GraphModule) -> list[str]:
    """Matrix products with a weight that no loop has taken, with their shapes and the source line they stand on."""
    return [
        f"{node.name} {tuple(node.meta['val'].shape)} {source_of(node)}"
        for node in gm.graph.nodes
        if is_heavy(node) and any(i.op == "placeholder" for i in node.all_input_nodes)
    ]


def chunked(mini_sequence: int = 24, lm_head: int = 20, lower: str = "aot_eager", **more: Any) -> dict[str, Any]:
    """Options with chunks small enough for tiny shapes; sizes that divide nothing."""
    sizes = {"mini_sequence": {"chunk_tokens": mini_sequence}, "lm_head": {"chunk_tokens": lm_head}}
    return {"lower": lower, **sizes, **more}


def compare(
    fn: Callable[..., Any],
    leaves: Mapping[str, Tensor],
    inputs: Sequence[Any] = (),
    options: Mapping[str, Any] | None = None,
) -> Comparison:
    """Run ``fn(*inputs)``, a loss, and its backward eagerly and through mstc.

    leaves: what gets gradients, by name.
    """
    torch._dynamo.reset()
    mstc.clear_reports()
    loss, reference = gradients_of(fn, leaves, inputs)
    compiled = torch.compile(fn, backend="mstc", options=dict(chunked() if options is None else options))
    with lowered_graphs() as graphs:
        got, gradients = gradients_of(compiled, leaves, inputs)
    missing = [n for n in leaves if (reference[n] is None) != (gradients[n] is None)]
    errors = gradient_errors(gradients, reference)
    where = max(errors, key=lambda n: (errors[n] != errors[n], errors[n]), default="")
    return Comparison(
        _loss_error(got, loss), errors.get(where, 0.0), where, missing, list(mstc.reports()), list(graphs)
    )


def _loss_error(got: Tensor, loss: Tensor) -> float:
    if bool(loss.isnan()) and bool(got.isnan()):
        return 0.0
    return abs(got.double().item() - loss.double().item()) / max(abs(loss.double().item()), 1.0)
