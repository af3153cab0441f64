"""Axis inference: which factor of which dimension of every value is the same axis.

Axes are born at dimensions that no operand explains (a placeholder's, a linear's output, a mixer's
result), flow through the rules of `mstc.graph.rules`, and are united where a rule aligns two of
them. Neither names nor sizes are matched: two axes of equal size stay two until an op aligns them.

An axis's identity only proposes what might run piece by piece. What is *proved*, node by node, is
`Axes.tokenwise`: index t of the result reads index t of each operand that carries the axis, and
nothing else of it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.fx as fx

from mstc.graph.editor import has_order
from mstc.graph.places import Flow, Lost, Place, fits, same_place
from mstc.graph.rules import flow_of, rule_of
from mstc.graph.rules.call import operands_of
from mstc.graph.sizes import same, shape_of
from mstc.graph.trail import Trail

Axis = int


@dataclass(frozen=True)
class Tokenwise:
    """Proof that a node treats one axis index by index.

    place: of the axis in the node's results; needs: for each operand in order, the place along
    which it is cut, or None where it is shared whole by all indices.
    """

    place: Place
    needs: tuple[Place | None, ...]


@dataclass(frozen=True)
class NotTokenwise:
    """Why a node is not tokenwise along an axis; ``sums``: it adds up over the whole axis."""

    reason: str
    sums: bool = False


class Axes:
    """The axes of all values of one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self._parent: list[Axis] = []
        self._places: dict[fx.Node, list[tuple[Axis, Place]]] = {}
        self._flows: dict[fx.Node, Flow | None] = {}
        self._counts: set[fx.Node] = set()
        self._followed: dict[tuple[fx.Node, Place], Axis] = {}
        for node in graph.nodes:
            self._visit(node)

    # -- questions ---------------------------------------------------------------------------

    def find(self, axis: Axis) -> Axis:
        while self._parent[axis] != axis:
            self._parent[axis] = self._parent[self._parent[axis]]
            axis = self._parent[axis]
        return axis

    def of(self, node: fx.Node) -> set[Axis]:
        """The axes that stand in the node's value."""
        return {self.find(a) for a, _ in self._places.get(node, ())}

    def places(self, node: fx.Node, axis: Axis) -> list[Place]:
        """Where ``axis`` stands in the node's value: once where all is well, twice in an S x S mask."""
        found: list[Place] = []
        for a, place in self._places.get(node, ()):
            if self.find(a) == axis and place not in found:
                found.append(place)
        return found

    def flow(self, node: fx.Node) -> Flow | None:
        return self._flows.get(node)

    def tokenwise(self, node: fx.Node, axis: Axis) -> Tokenwise | NotTokenwise:
        """Prove that ``node`` may run on pieces of ``axis``, or say why not."""
        if node.target is operator.getitem:
            return self._tokenwise_item(node, axis)
        flow = self._flows.get(node)
        if flow is None:
            known = rule_of(node.target) is not None
            return NotTokenwise(
                f"{node.target} {'is not covered with these arguments' if known else 'has no axis rule'}"
            )
        places = self.places(node, axis)
        operands = operands_of(node)
        if len(places) != 1:
            return self._explain_absent(node, axis, flow, operands, len(places))
        needs: list[Place | None] = []
        for i, operand in enumerate(operands):
            need = flow.back(i, places[0])
            held = [] if self._is_filled(operand) else self.places(operand, axis)
            if held and (len(held) > 1 or need is None or not same_place(held[0], need)):
                return NotTokenwise(f"{node.target} needs all indices of the axis of its operand {operand.name}")
            needs.append(need)
        if not any(needs) and not flow.repeats:
            return NotTokenwise(f"{node.target} makes the axis from all of its operands")
        return Tokenwise(places[0], tuple(needs))

    def _tokenwise_item(self, node: fx.Node, axis: Axis) -> Tokenwise | NotTokenwise:
        places = self.places(node, axis)
        if len(places) != 1:
            return NotTokenwise("the axis does not stand in this result")
        return Tokenwise(places[0], (places[0],))

    def _explain_absent(
        self, node: fx.Node, axis: Axis, flow: Flow, operands: list[fx.Node], count: int
    ) -> NotTokenwise:
        if count > 1:
            return NotTokenwise(f"{node.target} pairs the axis with itself")
        lost = [flow.carry(i, p) for i, operand in enumerate(operands) for p in self.places(operand, axis)]
        if lost and all(how is Lost.SUMMED for how in lost):
            return NotTokenwise(f"{node.target} sums over the axis", sums=True)
        return NotTokenwise(f"{node.target} mixes the axis")

    # -- sides of pairs ----------------------------------------------------------------------

    def follow(self, start: fx.Node, place: Place) -> Axis:
        """A new axis, which stands at one place of a value and wherever rules lead from there.

        It tells two sides of a grid of pairs apart, which an op aligned somewhere.
        """
        if (start, place) not in self._followed:
            self._parent.append(len(self._parent))
            self._followed[start, place] = self._parent[-1]
            for node, one in Trail(self._flows, self._counts).follow(start, place):
                self._places[node].append((self._parent[-1], one))
        return self._followed[start, place]

    # -- inference ---------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            self._bear(node, [])
        elif node.op == "call_function":
            if node.target is operator.getitem:
                source = node.args[0]
                self._bear(node, list(self._places.get(source, ())) if isinstance(source, fx.Node) else [])
                return
            flow = flow_of(node)
            self._flows[node] = flow
            if self._is_counted(node):
                self._counts.add(node)
            self._bear(node, self._carried(node, flow) if flow is not None else [])
            if flow is not None:
                self._hand_back(node, flow)

    def _hand_back(self, node: fx.Node, flow: Flow) -> None:
        """Let what is made of counts, which aligns nothing, have the axes of all that it is used for."""
        for i, operand in enumerate(operands_of(node)):
            if operand in self._counts and node not in self._counts:
                for axis, place in self._places[node]:
                    self._give(operand, axis, flow.back(i, place))

    def _give(self, node: fx.Node, axis: Axis, place: Place | None) -> None:
        if place is None or any(same_place(place, known) for known in self.places(node, self.find(axis))):
            return
        self._places[node].append((axis, place))
        flow = self._flows.get(node)
        if flow is not None:
            for i, operand in enumerate(operands_of(node)):
                if operand in self._counts:
                    self._give(operand, axis, flow.back(i, place))

    def _is_filled(self, node: fx.Node) -> bool:
        """Whether any piece of a value is like any other."""
        flow = self._flows.get(node)
        return flow is not None and flow.repeats and not operands_of(node)

    def _is_counted(self, node: fx.Node) -> bool:
        """Whether a value is made from nothing, or of such values and frequencies: positions, tables of angles."""
        operands = operands_of(node)
        counted = [i for i in operands if i in self._counts]
        rest = [i for i in operands if i not in self._counts]
        return not has_order(node) and (bool(counted) or not operands) and all(map(_is_vector, rest))

    def _carried(self, node: fx.Node, flow: Flow) -> list[tuple[Axis, Place]]:
        """The axes that a node's operands explain; what is made of counts alone aligns nothing."""
        found: list[tuple[Axis, Place]] = []
        for i, operand in enumerate(operands_of(node)):
            if operand in self._counts and node not in self._counts:
                continue  # one table of angles may number rows and columns
            for axis, place in self._places.get(operand, ()):
                carried = flow.carry(i, place)
                if isinstance(carried, Lost) or flow.back(i, carried) is None:
                    continue
                for other, known in found:
                    if same_place(known, carried):
                        self._unite(other, axis)
                        break
                else:
                    found.append((axis, carried))
        return found

    def _bear(self, node: fx.Node, carried: list[tuple[Axis, Place]]) -> None:
        """Give a new axis to every dimension that no operand explains."""
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], torch.Tensor):
            value = value[0]
        if not isinstance(value, torch.Tensor):
            self._places[node] = []
            return
        shape = shape_of(value)
        # Pieces of unequal sizes: the places in the first say nothing of the others.
        places = [(a, p) for a, p in carried if p.dim < len(shape) and fits(p, shape[p.dim])]
        explained = {p.dim for _, p in places}
        for dim, extent in enumerate(shape):
            if dim not in explained and not same(extent, 1):
                self._parent.append(len(self._parent))
                places.append((self._parent[-1], Place(dim, extent)))
        self._places[node] = places

    def _unite(self, a: Axis, b: Axis) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)


def _is_vector(node: fx.Node) -> bool:
    """A buffer of one dimension."""
    return node.op != "call_function" and node.meta["val"].dim() <= 1 and not node.meta.get("needs_grad")
