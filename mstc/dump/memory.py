"""Live bytes over one training step, predicted from a graph by liveness.

The forward runs node by node, in order; a value lives until its last reader, or, where the backward
needs it, until that node's backward ran. The backward runs in reverse. Which values a node keeps follows
its derivative (`_kept`); loops tell it themselves. Views own nothing. An op's own scratch memory, fusion
and the allocator are not modelled, so the figures compare two graphs rather than foretell one.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc.dump.model import Memory
from mstc.graph.costs import nbytes
from mstc.graph.live import is_view
from mstc.ops.program import Program, program
from mstc.passes.loops import is_loop

aten = torch.ops.aten

_KEEPS_NOTHING = {
    "add", "sub", "neg", "sum", "mean", "cat", "stack", "_to_copy", "to", "clone", "where_self", "copy", "rsub",
    "constant_pad_nd", "embedding", "index_select", "roll", "flip", "repeat", "cumsum", "tril", "triu", "masked_fill",
}  # fmt: skip
_KEEPS_RESULT = {"exp", "sqrt", "rsqrt", "tanh", "sigmoid", "relu", "softmax", "_softmax", "log_softmax", "reciprocal"}
_KEEPS_BOTH = {"scaled_dot_product_attention", "amax", "amin", "logsumexp", "cumprod"}
_KEEPS_COPY = {"cross_entropy_loss"}  # its log-softmax, as large as the logits


@dataclass(frozen=True)
class Scratch:
    """Working set of one chunk of a loop: all values that it makes, and the widest of them."""

    made: int
    widest: int


def predict(
    graph: fx.Graph, training: bool, scratch: Mapping[str, Scratch] | None = None, name: Callable[[str], str] = str
) -> Memory:
    """The memory of one step of the graph; without ``training`` the forward only.

    scratch: of the loops, by the name of their node; name: how a step is called in the result.
    """
    return _Step(list(graph.nodes), training, scratch or {}, name).run()


class _Step:
    """Plays one step; every value is counted where it appears and where it goes."""

    def __init__(
        self, nodes: list[fx.Node], training: bool, scratch: Mapping[str, Scratch], name: Callable[[str], str]
    ) -> None:
        self.nodes, self.training, self.scratch, self.name = nodes, training, scratch, name
        self.roots = _roots(nodes)
        self.inputs = {n for n in nodes if n.op in ("placeholder", "get_attr")}
        self.kept = {n: self._needed(n) for n in nodes} if training else {}
        self.again = {n: self._made_again(n) for n in nodes} if training else {}
        self.holders = Counter(v for values in self.kept.values() for v in values)
        self.last = _last_readers(nodes, self.roots)
        self.flowing: dict[fx.Node, int] = {}  # gradients of activations
        self.done: set[fx.Node] = set()  # inputs that have their gradient
        self.parameters = sum(nbytes(n) for n in self.inputs)
        self.gradients = self.saved = self.temporary = 0
        self.rows: list[tuple[str, int, int, int, int]] = []

    def run(self) -> Memory:
        for node in self.nodes:
            if node.op == "call_function":
                self._forward(node)
        backward = len(self.rows)
        for node in reversed(self.nodes) if self.training else ():
            if node.op == "call_function" and node.meta.get("needs_grad"):
                self._backward(node)
        steps, *parts = (tuple(c) for c in zip(*self.rows, strict=True)) if self.rows else ((),) * 5
        return Memory(steps, backward, *parts)

    def _note(self, node: fx.Node, scratch: int) -> None:
        row = (self.parameters, self.gradients, self.saved, self.temporary + scratch)
        self.rows.append((self.name(node.name), *row))

    # -- forward -----------------------------------------------------------------------------

    def _forward(self, node: fx.Node) -> None:
        if self.roots[node] is node:
            self._count(node, nbytes(node))
        if self.training and node.meta.get("needs_grad"):
            self.saved += _own(node)
        for value in _made_gradients(node):
            self._made_early(value, 1)
        self._note(node, self._working(node, backward=_is_loss_loop(node)))
        for value in self.last.get(node, ()):
            if value not in self.holders and value not in self.inputs:
                self._count(value, -nbytes(value))

    def _count(self, value: fx.Node, size: int) -> None:
        if value in self.holders:
            self.saved += size
        else:
            self.temporary += size

    def _made_early(self, value: fx.Node, sign: int) -> None:
        """A gradient that a loss loop made in the forward, kept until its backward."""
        if value in self.inputs:
            self.gradients += sign * nbytes(value)
        else:
            self.saved += sign * nbytes(value)

    def _working(self, node: fx.Node, backward: bool) -> int:
        known = self.scratch.get(node.name)
        if known is None or not is_loop(node):
            return 0
        return known.made + 2 * known.widest + _accumulators(node) if backward else known.made

    # -- backward ----------------------------------------------------------------------------

    def _backward(self, node: fx.Node) -> None:
        again = self.again[node]
        for value in _made_gradients(node):
            self._made_early(value, -1)
        for value in node.all_input_nodes:
            if value.meta.get("needs_grad"):
                self._gradient(node, value)
        early = _is_loss_loop(node)
        self._note(node, again if early else again + self._working(node, backward=True))
        self.temporary -= self.flowing.pop(node, 0)
        self.saved -= _own(node)
        for value in self.kept[node]:
            self.holders[value] -= 1
            if not self.holders[value]:
                self.saved -= nbytes(value)

    def _gradient(self, node: fx.Node, value: fx.Node) -> None:
        """The gradient of an operand appears; that of a view's or a sum's is the incoming one, handed on."""
        if value in self.inputs:
            if value not in self.done:
                self.gradients += nbytes(value)
                self.done.add(value)
            return
        if value not in self.flowing and _hands_on(node):
            self.flowing[value] = self.flowing.get(node, 0)
            self.flowing[node] = 0
            return
        more = max(nbytes(value) - self.flowing.get(value, 0), 0)
        self.flowing[value] = self.flowing.get(value, 0) + more
        self.temporary += more

    def _needed(self, node: fx.Node) -> set[fx.Node]:
        """The storages that the node's backward reads, inputs of the graph left out."""
        if node.op != "call_function" or not node.meta.get("needs_grad"):
            return set()
        values = {self.roots[v] for v in _kept(node)}
        kept = {v for v in values if v not in self.inputs and not _of_tagged_loop(v)}
        return {v for v in kept if not (_recomputed(node) and _recomputed(v))}

    def _made_again(self, node: fx.Node) -> int:
        """Bytes that are made a second time just for the node's backward."""
        if node.op != "call_function" or not node.meta.get("needs_grad"):
            return 0
        loops = sum(nbytes(v) for v in {self.roots[v] for v in _kept(node)} if _of_tagged_loop(v))
        own = _recomputed(node) and self.roots[node] is node and not is_loop(node)
        return loops + (nbytes(node) if own else 0)


def _last_readers(nodes: Sequence[fx.Node], roots: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the storages that nothing reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last[roots[node]] = node
        for value in node.all_input_nodes:
            last[roots[value]] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for value, node in last.items():
        found.setdefault(node, []).append(value)
    return found


# ------------------------------------------------------------------ what the ops keep


def _roots(nodes: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The node whose memory each node's value lies in. Each result of an op with several has its own."""
    roots: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        shares = source is not None and (is_view(node) or _splits(node))
        roots[node] = roots[source] if shares and source is not None else node
    return roots


def _splits(node: fx.Node) -> bool:
    """One of several views that a split or unbind returned."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and is_view(source)


def _kept(node: fx.Node) -> Iterator[fx.Node]:
    if is_loop(node):
        yield from _kept_by_loop(node, program(_key(node)))
        return
    name = str(node.target).removeprefix("aten.").split(".")[0]
    operands = [v for v in node.all_input_nodes if isinstance(v.meta.get("val"), torch.Tensor)]
    if node.target is operator.getitem or is_view(node) or name in _KEEPS_NOTHING:
        return
    if name in ("mul", "mm", "bmm", "matmul", "linear", "addmm", "div"):
        yield from _factors(operands)
        return
    if name in _KEEPS_RESULT or name in _KEEPS_BOTH:
        yield node
    if name not in _KEEPS_RESULT and name not in _KEEPS_COPY:
        yield from operands


def _factors(operands: Sequence[fx.Node]) -> Iterator[fx.Node]:
    """Of a product each factor is kept whose partner needs a gradient."""
    for value in operands:
        others = [v for v in operands if v is not value] or [value]
        if any(v.meta.get("needs_grad") for v in others):
            yield value


def _kept_by_loop(node: fx.Node, found: Program) -> Iterator[fx.Node]:
    if found.backward is None or _is_loss_loop(node):
        return  # in inference nothing; a loss keeps its gradients (`_made_gradients`)
    tokens, shared = _operands(node)
    yield from (tokens[i] for i in found.backward.tokens)
    yield from (shared[i] for i in found.backward.shared)
    if not _recomputed(node):
        results = {u.args[1]: u for u in node.users if u.target is operator.getitem}
        yield from (results[i] for i in found.backward.kept if i in results)


def _made_gradients(node: fx.Node) -> list[fx.Node]:
    """The operands whose gradients a loss loop makes in the forward."""
    if not _is_loss_loop(node):
        return []
    found = program(_key(node))
    tokens, shared = _operands(node)
    needs = (*found.token_needs, *found.shared_needs)
    return [v for v, need in zip((*tokens, *shared), needs, strict=True) if need]


def _is_loss_loop(node: fx.Node) -> bool:
    return str(node.target) == "mstc.loss_loop.default"


def _operands(node: fx.Node) -> tuple[Sequence[fx.Node], Sequence[fx.Node]]:
    tokens: Any = node.args[0]
    shared: Any = node.args[1]
    return tokens, shared


def _accumulators(node: fx.Node) -> int:
    """Bytes of the float32 sums of weights' gradients, where the weights have lower precision."""
    found = program(_key(node))
    needing = [v for v, need in zip(found.shared, found.shared_needs, strict=True) if need]
    wide = [(v, found.accumulator_dtype(v.dtype)) for v in needing]
    return sum(math.prod(v.shape) * dtype.itemsize for v, dtype in wide if dtype != v.dtype)


def _own(node: fx.Node) -> int:
    """Bytes that an op keeps for its backward besides values of the graph."""
    name = str(node.target).removeprefix("aten.").split(".")[0]
    return nbytes(node.all_input_nodes[0]) if name in _KEEPS_COPY and node.all_input_nodes else 0


def _hands_on(node: fx.Node) -> bool:
    return is_view(node) or node.target is operator.getitem or node.target in (aten.add.Tensor, aten.sub.Tensor)


def _of_tagged_loop(node: fx.Node) -> bool:
    """A result of a loop that runs again in the backward: whoever needs it there reads the new one."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and is_loop(source) and _recomputed(source)


def _recomputed(node: fx.Node) -> bool:
    return node.meta.get("recompute") is not None


def _key(node: fx.Node) -> str:
    key = node.args[-1]
    assert isinstance(key, str)
    return key
