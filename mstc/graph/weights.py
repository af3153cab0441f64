"""Weights: what products multiply tokens by, be it a parameter or computed of parameters in the graph.

A head may normalize its weight, merge an adapter into it or round it to few values. What is computed of
parameters and buffers alone is a weight as they are; but a product of two such values is no work on tokens.

An input that no module holds may be either: functional calls are handed weights, a step may be handed hidden states,
keys or a mask of floats. Where modules hold weights, such an input is one too only if it is a matrix (an adapter, the
head of a teacher); with more dimensions it is data. Weights of experts that each token chooses of a stack are weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.fx as fx

from mstc.graph.axes import Axes, Axis
from mstc.graph.costs import factors_of, is_heavy
from mstc.graph.reach import ancestors

aten = torch.ops.aten

_CHOICES = (aten.index.Tensor, aten.index_select.default)


class Weights:
    """The weights of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        inputs = graph.find_nodes(op="placeholder")
        given = [n for n in inputs if not n.meta.get("held")]
        self._made = made_of_weights(graph)
        self._chosen = [n for n in given if _is_integer(n)]
        holds = any(n.meta.get("held") and _is_float(n) and n.meta["val"].dim() > 1 for n in inputs)
        self._data = {n for n in given if holds and _is_float(n) and n.meta["val"].dim() > 2}

    def in_product(self, node: fx.Node) -> fx.Node | None:
        """The factor of a product that is a weight: the last one that could be."""
        if not is_heavy(node):
            return None
        factors = factors_of(node)
        for operand in factors[::-1]:
            if isinstance(operand, fx.Node) and (
                self._is_plain(operand)
                or stack_of(operand) is not None
                or (operand in self._made and not self._made.issuperset(factors))
            ):
                return operand
        return None

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a value is a weight, plain or computed."""
        return self._is_plain(node) or node in self._made

    def is_held(self, node: fx.Node) -> bool:
        """Whether a value is made of what modules hold, and of constants, alone."""
        return node in self._made

    def is_raw(self, node: fx.Node) -> bool:
        """Whether a value is what a module holds, perhaps cast, viewed or transposed."""
        return node in self._made and self._is_plain(node)

    def _is_plain(self, node: fx.Node) -> bool:
        """Whether a value is an input that is a weight or a constant, perhaps cast, viewed or transposed."""
        node = source_of_views(node)
        return node.op in ("placeholder", "get_attr") and _is_float(node) and node not in self._data

    def features(self, axes: Axes, products: list[fx.Node]) -> set[Axis]:
        """The axes that stand in the weights of products, but for those along which a weight is repeated (a batch).

        A computed weight may also stand for positions: axes of the inputs' tokens are not counted for it, nor those
        along which every row is multiplied by a matrix of its own that was looked up for it (relative positions).
        """
        pairs = [(n, stack_of(w) or w) for n in products if (w := self.in_product(n)) is not None]
        found = {w for _, w in pairs}
        own = _own_axes(found, axes)
        plain = {a for w in found if self._is_plain(w) for a in own[w]}
        computed = {a for w in found if not self._is_plain(w) for a in own[w]}
        positions = {a for n in self._chosen for a in axes.of(n)}
        positions |= {a for a in computed - plain - positions if self._is_looked_up(a, axes, pairs)}
        return plain | computed - positions

    def _is_looked_up(self, axis: Axis, axes: Axes, pairs: Iterable[tuple[fx.Node, fx.Node]]) -> bool:
        """Whether an axis of computed weights is no parameter's, and stands in the other factor and the result too."""
        for product, weight in pairs:
            if axis not in axes.of(weight):
                continue
            if not all(axis in axes.of(n) for n in (product, *factors_of(product)) if isinstance(n, fx.Node)):
                return False
            if any(axis in axes.of(n) for n in ancestors([weight]) if n.op == "placeholder" and _is_float(n)):
                return False
        return True


def source_of_views(node: fx.Node) -> fx.Node:
    """What a value is cast, viewed or transposed from."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node


def stack_of(value: fx.Node) -> fx.Node | None:
    """The weights of all experts where a value holds each token's own: those that it chooses of the stack."""
    chosen = source_of_views(value)
    if chosen.target not in _CHOICES:
        return None
    stack = chosen.all_input_nodes[0]
    given = source_of_views(stack).op in ("placeholder", "get_attr")
    return stack if given and _is_float(stack) and stack.meta["val"].dim() > 2 else None


def _own_axes(weights: Collection[fx.Node], axes: Axes) -> dict[fx.Node, set[Axis]]:
    """The axes of weights, and of what they are made of, that no expand gave them."""
    own: dict[fx.Node, set[Axis]] = {}
    above = ancestors(weights)
    for node in next(iter(weights)).graph.nodes if weights else ():
        if node not in above:
            continue
        known = {a for i in node.all_input_nodes for a in axes.of(i)}
        kept = {a for i in node.all_input_nodes for a in own[i]}
        flow = axes.flow(node)
        repeats = flow is not None and flow.repeats and bool(node.all_input_nodes)
        own[node] = axes.of(node) & (kept if repeats else kept | axes.of(node) - known)
    return own


def made_of_weights(graph: fx.Graph) -> set[fx.Node]:
    """Parameters and buffers, and what is computed of them and of constants alone.

    Rows that are looked up in a table are no weight: positions choose them.
    """
    made: set[fx.Node] = set()
    constants: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node.meta.get("held"):
                made.add(node)
            elif _is_number(node):
                constants.add(node)
        elif node.op == "get_attr" or (node.op == "call_function" and constants.issuperset(node.all_input_nodes)):
            constants.add(node)
        elif (
            node.op == "call_function"
            and node.target is not aten.embedding.default
            and all(i in made or i in constants for i in node.all_input_nodes)
        ):
            made.add(node)
    return made


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.dim() == 0


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex())
