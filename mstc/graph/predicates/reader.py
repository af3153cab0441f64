"""Reading one element of a tensor out of a graph, without computing the tensor.

`Reader.value(node, index)` tells what stands in ``node`` at ``index``: sources (arange, full, buffers of
known values) are evaluated at the index, views move it, elementwise ops are carried out on what stands at
it. Where no rule applies the answer is a *leaf*: a symbol for "``node`` at ``index``", the same symbol
whenever the same element is meant. Two elementwise ops without a rule on equal operands are equal leaves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc.graph.predicates import elementwise, sources, views
from mstc.graph.predicates.bounds import Box
from mstc.graph.predicates.call import Call, Unread, call_of, dtype_of, is_tensor, shape_of, size
from mstc.graph.predicates.constants import Bands, Ramp
from mstc.graph.predicates.reading import Index, Leaf, Run
from mstc.graph.predicates.terms import Expr, Holds, Value, number

DEEPEST = 48  # nodes between a mask and its sources; the masks of known models have at most 25
UNTAGGED = (torch.ops.aten.floor_divide, torch.ops.aten._to_copy)  # elementwise, but torch does not tag them so
RULES = {**elementwise.RULES, **sources.RULES}

# What a node is known to hold, if anything.
Known = Callable[[fx.Node], Ramp | Bands | None]


class Reader:
    """Reads elements of one graph.

    known: the description of a buffer's values for a placeholder or constant, None if there is none.
    After reading, `used` holds the nodes whose described values were read.
    """

    def __init__(self, known: Known = lambda node: None) -> None:
        self.box = Box()
        self.leaves: dict[Expr, Leaf] = {}
        self.runs: dict[Expr, Run] = {}
        self.used: set[fx.Node] = set()
        self._known = known
        self._symbols: dict[object, Expr] = {}
        self._values: dict[tuple[fx.Node, Index], Value] = {}
        self._depth = 0

    def value(self, node: fx.Node, index: Index) -> Value:
        """What stands in ``node`` at ``index``."""
        key = (node, index)
        if key not in self._values:
            self._depth += 1
            try:
                self._values[key] = self._read(node, index)
            except Unread:
                self._values[key] = self.leaf(node, index)
            finally:
                self._depth -= 1
        return self._values[key]

    def leaf(self, node: fx.Node, index: Index, key: object = None) -> Value:
        """The symbol for ``node`` at ``index``, or for ``key`` where that says the same of several nodes."""
        key = key or (node, index)
        if key not in self._symbols:
            self._symbols[key] = sympy.Dummy(node.name, integer=True)
            self.leaves[self._symbols[key]] = Leaf(node, index)
        symbol = self._symbols[key]
        return Holds(symbol) if dtype_of(node) is torch.bool else symbol

    def operand(self, arg: object, index: Index) -> tuple[Value, torch.dtype | None]:
        """What an elementwise op reads from one argument, and its dtype (None: a scalar)."""
        if isinstance(arg, fx.Node) and is_tensor(arg):
            return self.value(arg, views.broadcast(shape_of(arg), index)), dtype_of(arg)
        if isinstance(arg, bool | int | float):
            return number(arg), None
        return size(arg), None

    def _read(self, node: fx.Node, index: Index) -> Value:
        if self._depth > DEEPEST:
            raise Unread("too far from the sources")
        described = self._known(node)
        if described is not None:
            self.used.add(node)
            return sources.described(described, index)
        call = call_of(node)
        if call is None:
            raise Unread("no operator")
        moved = views.pull_back(call, self.box, index)
        if moved is not None:
            return self.value(*moved)
        if call.op in RULES:
            try:
                return RULES[call.op](self, call, index)
            except Unread:
                pass  # it may still equal another application of the same op
        return self._structural(call, index)

    def _structural(self, call: Call, index: Index) -> Value:
        """A leaf that equals every other application of the same elementwise op to the same operands."""
        target: Any = call.node.target
        elementwise_op = torch.Tag.pointwise in target.tags or call.op in UNTAGGED
        if not elementwise_op or torch.Tag.nondeterministic_seeded in target.tags:
            raise Unread("not elementwise")
        if dtype_of(call.node).is_floating_point:
            raise Unread("a floating-point value that is only known at run time")
        key: list[object] = [target, dtype_of(call.node)]
        for arg in call.args:
            if isinstance(arg, fx.Node):
                key.append(self.operand(arg, index))
            else:
                key.append((type(arg), str(arg)))
        return self.leaf(call.node, index, tuple(key))
