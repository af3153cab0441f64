"""The trail of one place: where rules lead from it, forward and backward, through a whole graph.

Axis inference unites what an op aligns: where the sides of a grid of pairs meet (``z_ij = sum over k of a_ik b_jk``),
they are one axis, which then stands twice in every value and cannot be cut. A trail begins at one of the two places.
A value that it reaches at both is where the sides meet: that one is not on the trail.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.fx as fx

from mstc.graph.places import Flow, Lost, Place, fits, same_place
from mstc.graph.rules.call import operands_of
from mstc.graph.sizes import shape_of


@dataclass(frozen=True)
class Trail:
    """flows: by node, None where no rule knows it; aside: values that align nothing, which no trail enters."""

    flows: Mapping[fx.Node, Flow | None]
    aside: Collection[fx.Node]

    def follow(self, start: fx.Node, place: Place) -> Iterator[tuple[fx.Node, Place]]:
        """The values on the trail, each with the place that it stands at. Results of one op are all on it or none."""
        found: dict[fx.Node, Place | None] = {}
        waiting = deque([(start, place)])
        while waiting:
            node, at = waiting.popleft()
            node = self._whole(node)
            if node not in found:
                found[node] = at
                waiting.extend(self._before(node, at))
                waiting.extend(self._behind(node, at))
            elif (known := found[node]) is not None and not same_place(at, known):
                found[node] = None
        for node, one in found.items():
            if one is not None:
                yield from ((value, one) for value in (node, *self._results(node, one)))

    def _before(self, node: fx.Node, place: Place) -> Iterator[tuple[fx.Node, Place]]:
        flow = self.flows.get(node)
        if flow is None:
            return
        for i, operand in enumerate(operands_of(node)):
            need = flow.back(i, place)
            if need is not None and operand not in self.aside:
                yield operand, need

    def _behind(self, node: fx.Node, place: Place) -> Iterator[tuple[fx.Node, Place]]:
        for value in (node, *self._results(node, place)):
            for user in value.users:
                flow = self.flows.get(user)
                if flow is not None:
                    yield from ((user, p) for p in _carried(flow, operands_of(user), value, place))

    def _whole(self, node: fx.Node) -> fx.Node:
        """What a value is one of several results of, all alike; itself where it is the only one."""
        source = node.all_input_nodes[0] if node.target is operator.getitem else node
        return source if self.flows.get(source) is not None else node

    def _results(self, node: fx.Node, place: Place) -> Iterator[fx.Node]:
        """The results of a node that makes several, as far as they have the place."""
        if self.flows.get(node) is not None:
            for user in node.users:
                shape = shape_of(user.meta["val"]) if user.target is operator.getitem else ()
                if place.dim < len(shape) and fits(place, shape[place.dim]):
                    yield user


def _carried(flow: Flow, operands: Sequence[fx.Node], value: fx.Node, place: Place) -> Iterator[Place]:
    """The places in a result of a place in a value, each time that it is read."""
    for i, operand in enumerate(operands):
        carried = flow.carry(i, place) if operand is value else Lost.MIXED
        if not isinstance(carried, Lost) and flow.back(i, carried) is not None:
            yield carried
