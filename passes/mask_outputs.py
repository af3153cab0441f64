"""Masks that a graph returns: what is proven of them is told to the graphs that get them.

A boolean mask [..., S, S] that is a band of diagonals, the same for every row of the batch, is recorded for the
backend, which marks the tensor after each call (`mstc.graph.predicates.marks`). Nothing in the graph changes: exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.predicates.call import Unread, shape_of
from mstc.graph.predicates.constants import Bands, Ramp
from mstc.graph.predicates.facts import MaskFact
from mstc.graph.predicates.reader import Reader
from mstc.graph.predicates.verdict import fact_of
from mstc.graph.results import returned_by
from mstc.passes.base import Context, Pass
from mstc.report import Fidelity


@dataclass(frozen=True)
class MaskOutput:
    """The output at ``position``, and what its values are."""

    position: int
    node: fx.Node
    fact: MaskFact
    values: Ramp | Bands


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[MaskOutput]:
    proven: dict[fx.Node, MaskFact | None] = {}
    for position, node in enumerate(returned_by(gm.graph)):
        if not isinstance(node, fx.Node) or not _is_mask(node):
            continue
        if node not in proven:
            proven[node] = _fact(node)
        fact = proven[node]
        if fact is not None:
            yield MaskOutput(position, node, fact, _values(fact, int(node.meta["val"].shape[-2])))


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or value.dtype is not torch.bool:
        return False
    return value.dim() >= 2 and isinstance(value.shape[-1], int) and value.shape[-1] == value.shape[-2] > 1


def _fact(node: fx.Node) -> MaskFact | None:
    """What the mask is, whatever the values of the graph's inputs."""
    queries, keys = shape_of(node)[-2:]
    try:
        fact = fact_of(node, queries, keys, Reader())
    except Unread:
        return None
    plain = isinstance(fact, MaskFact) and fact.documents is None and fact.padding is None
    return fact if plain and isinstance(fact, MaskFact) else None


def _values(fact: MaskFact, n: int) -> Ramp | Bands:
    """The mask by d = query - key: seen where low <= d <= high."""
    low = 0 if fact.causal else None if fact.window is None else 1 - fact.window
    high = None if fact.window is None or fact.window > n - 1 else fact.window - 1
    pieces = [] if low is None or low <= 1 - n else [(low - 1, False)]
    pieces += [(n - 1, True)] if high is None else [(high, True), (n - 1, False)]
    if len(pieces) == 1:
        return Ramp(True, 0, 0)
    return Bands(tuple(limit for limit, _ in pieces), tuple(value for _, value in pieces))


def apply(editor: Editor, site: MaskOutput, ctx: Context) -> None:
    ctx.facts.setdefault("output_marks", {})[site.node] = site.values
    ctx.plan.append(f"output {site.position} is a mask ({site.fact.label}); graphs that get it are told")


MASK_OUTPUTS = Pass("mask_outputs", "masks", Fidelity.EXACT, find, apply)
