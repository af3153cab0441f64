"""Which pairs written-out attention hides, in people's words: causal, a window, padding, nothing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx

from mstc.graph.editor import has_order
from mstc.graph.predicates.call import Unread, shape_of
from mstc.graph.predicates.facts import MaskFact
from mstc.graph.predicates.reader import Known, Reader
from mstc.graph.predicates.terms import Expr
from mstc.graph.predicates.verdict import DROPPED, fact_of
from mstc.graph.rules.call import Call
from mstc.graph.sizes import same, size
from mstc.graph.written import Written

aten = torch.ops.aten

_WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)


class MaskLabels:
    """Reads the masks of one graph, those that layers share once.

    known: what constants hold.
    """

    def __init__(self, known: Known) -> None:
        self._reader = Reader(known)
        self._facts: dict[tuple[fx.Node, bool, Expr, Expr], MaskFact | None] = {}

    def of(self, written: Written) -> str:
        """What is proven of all that hides pairs: "causal", "no mask", ...; "explicit mask" where something is not."""
        if not written.scores:
            return "explicit mask"
        queries, keys = shape_of(written.scores[0])[-2:]
        labels: dict[str, None] = {}
        for mask, hides in _masks(written):
            fact = None if hides is None else self._fact(mask, hides, queries, keys)
            if fact is None:
                return "explicit mask"
            if fact.kind != "all_true":
                labels[fact.label] = None
        return ", ".join(labels) or "no mask"

    def _fact(self, mask: fx.Node, hides: bool, queries: Expr, keys: Expr) -> MaskFact | None:
        key = (mask, hides, queries, keys)
        if key not in self._facts:
            try:
                fact = fact_of(mask, queries, keys, self._reader, hides=hides)
            except Unread:
                fact = None
            self._facts[key] = fact if isinstance(fact, MaskFact) else None
        return self._facts[key]


def _masks(written: Written) -> Iterator[tuple[fx.Node, bool | None]]:
    """What may hide keys from scores or weights, with whether it is True where a pair is dropped.

    None where it drops no pair for certain. What dropout drops and what is learned hides nothing.
    """
    path = path_of(written)
    for node in (n for n in written.region.nodes if n in path and n in written.keys and n not in written.scores):
        for other in node.all_input_nodes:
            learned = other.meta.get("needs_grad")
            if not (other in path or learned or _is_drawn(other)) and _tells_keys(other, node, written):
                yield other, _hides(node, other)


def _is_drawn(value: fx.Node) -> bool:
    """Whether a value is made of random numbers alone, as the mask of a dropout is."""
    while not has_order(value) and len(value.all_input_nodes) == 1:
        value = value.all_input_nodes[0]
    return has_order(value)


def _tells_keys(operand: fx.Node, node: fx.Node, written: Written) -> bool:
    """Whether an operand may have another value for another key."""
    value, place = operand.meta["val"], written.keys[node]
    if not isinstance(value, torch.Tensor):
        return False  # a dynamic length is the same for all keys
    behind = node.meta["val"].dim() - place.dim
    return behind <= value.dim() and not same(size(value.shape[-behind]), 1)


def _hides(node: fx.Node, mask: fx.Node) -> bool | None:
    if node.target is aten.add.Tensor:
        return False
    if node.target is aten.masked_fill.Scalar and drops(node.args[2]):
        return True
    if node.target in _WHERE and node.args[0] is mask and (drops(node.args[2]) or drops(node.args[1])):
        return drops(node.args[1])
    return None


def path_of(written: Written) -> set[fx.Node]:
    """Nodes of the region that the scores lead to."""
    found = set(written.scores)
    for node in written.region.nodes:
        if any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def drops(value: object) -> bool:
    """A number, or a tensor of one number, that a softmax makes 0."""
    if isinstance(value, fx.Node):
        if value.target not in (aten.full.default, aten.scalar_tensor.default) or value.meta["val"].numel() != 1:
            return False
        value = Call(value).arg("fill_value" if value.target is aten.full.default else "s")
    return isinstance(value, int | float) and value <= DROPPED
