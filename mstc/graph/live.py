"""Bytes that are live while a traced graph runs, above its inputs.

A value's memory begins with the node that makes it and ends with its last reader; views live in the memory of
what they view. Op by op (``fused`` False) every node makes its value. Fused, a chain of pointwise ops makes only
what something else needs whole: an operand of a matrix product, a result of the graph. Reductions read such a chain
as it is computed.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import torch
import torch.fx as fx

from mstc.graph.costs import is_heavy, nbytes
from mstc.graph.reach import ancestors

aten = torch.ops.aten

# The memories that Inductor reads at most to compute a value anew in each of its readers (`realize_reads_threshold`).
INLINED_READS = 4


def is_view(node: object) -> bool:
    """Whether the node's result lies in the memory of its first argument."""
    target = getattr(node, "target", None)
    if isinstance(node, fx.Node) and target is operator.getitem:
        return is_view(node.args[0])
    schema = getattr(target, "_schema", None)
    if target is aten._unsafe_view.default:  # a view that autograd knows nothing of
        return True
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def root_of(node: fx.Node) -> fx.Node:
    """The node whose memory this value lies in."""
    while node.op == "call_function" and is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def peak_bytes(gm: fx.GraphModule, fused: bool = False, pooled: bool = False) -> int:
    """The most bytes live at once while the graph runs, its inputs left out.

    pooled: freed memory stays with a pool that hands it out again for at most half of it (`mstc.ops.workspace`).
    """
    made = in_memory(gm.graph) if fused else None
    found = readers(gm.graph, made)
    ends = {value: nodes[-1] for value, nodes in found.items() if value.op == "call_function"}
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value, end in ends.items():
        dying.setdefault(end, []).append(value)
    memory = _Pool() if pooled else _Live()
    for node in gm.graph.nodes:
        gone = dying.get(node, [])
        if node.op == "call_function" and root_of(node) is node and (made is None or node in made):
            over = None
            if fused and not is_heavy(node):
                over = next((v for v in gone if may_write_over(node, v, found[v], made)), None)
            if over is not None:
                memory.rename(over, node)
                gone = [v for v in gone if v is not over]
            elif not _is_result(node):
                for value in _results(node):
                    memory.take(value)
            if node not in ends:
                memory.drop(node)
        for value in gone:
            memory.drop(value)
    return memory.peak


class _Live:
    """Memory that goes back when it is dropped."""

    def __init__(self) -> None:
        self._held: dict[fx.Node, int] = {}
        self._now = self.peak = 0

    def take(self, node: fx.Node) -> None:
        self._held[node] = nbytes(node)
        self._now += nbytes(node)
        self.peak = max(self.peak, self._now)

    def rename(self, old: fx.Node, new: fx.Node) -> None:
        self._held[new] = self._held.pop(old)

    def drop(self, node: fx.Node) -> None:
        self._now -= self._held.pop(node)


class _Pool(_Live):
    """Memory that is kept for the next value that it fits."""

    def __init__(self) -> None:
        super().__init__()
        self._free: list[int] = []

    def take(self, node: fx.Node) -> None:
        size = nbytes(node)
        fitting = [s for s in self._free if size <= s <= 2 * size]
        if fitting:
            self._held[node] = min(fitting)
            self._free.remove(min(fitting))
        else:
            self._held[node] = size
            self.peak += size

    def drop(self, node: fx.Node) -> None:
        self._free.append(self._held.pop(node))


def _is_result(node: fx.Node) -> bool:
    """Whether it stands for one of several results that an op makes."""
    return node.target is operator.getitem and not is_view(node)


def _results(node: fx.Node) -> list[fx.Node]:
    """What an op makes: itself, or each of its results that is read, all there before its operands go."""
    return [node, *filter(_is_result, node.users)]


def may_write_over(
    node: fx.Node, value: fx.Node, reading: Sequence[fx.Node], made: Mapping[fx.Node, None] | None
) -> bool:
    """Whether a fused kernel may write ``node`` over ``value`` (``SchedulerNode.decide_inplace_update`` of Inductor).

    Each other reader has run, since ``node`` is made of it (one that merely comes earlier may share the kernel), and
    each element is written where it was read.
    """
    return nbytes(value) == nbytes(node) and set(reading) <= ancestors([node]) and _in_place(node, value, made)


def _in_place(node: fx.Node, value: fx.Node, made: Mapping[fx.Node, None] | None) -> bool:
    """Whether ``node`` reads ``value`` in the order that both lie in, also through what is computed on the way."""
    for operand in node.all_input_nodes:
        root = root_of(operand)
        if root is value:
            if _reordered(operand.meta.get("val"), node.meta.get("val")):
                return False
        elif made is not None and root.op == "call_function" and root not in made and not _in_place(root, value, made):
            return False
    return True


def _reordered(read: object, written: object) -> bool:
    """Whether two values of one shape lie in memory in different orders."""
    if not isinstance(read, torch.Tensor) or not isinstance(written, torch.Tensor) or read.shape != written.shape:
        return False
    strides = zip(read.shape, read.stride(), written.stride(), strict=True)
    return any(a != b for size, a, b in strides if size != 1)


def readers(graph: fx.Graph, made: Mapping[fx.Node, None] | None) -> dict[fx.Node, list[fx.Node]]:
    """For each value in memory, the nodes that read it, in order. What is not made whole reads where it is read.

    made: as of `in_memory`, None for all.
    """
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and (made is not None and node not in made):
            continue
        if is_view(node):
            continue
        for value in _sources(node, made):
            found.setdefault(value, []).append(node)
    return found


def _sources(node: fx.Node, made: Mapping[fx.Node, None] | None) -> set[fx.Node]:
    """The memories that a node reads, through views and through what is computed on the way."""
    found: set[fx.Node] = set()
    stack = [root_of(i) for i in node.all_input_nodes]
    seen: set[fx.Node] = set()
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        if made is None or value.op != "call_function" or value in made:
            found.add(value)
        else:
            stack.extend(root_of(i) for i in value.all_input_nodes)
    return found


def in_memory(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes whose values exist in memory when pointwise chains are fused, each once."""
    made: dict[fx.Node, None] = {}
    reads: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        opaque = node.op == "call_function" and not is_fusible(node) and not is_view(node)
        if node.op == "output" or (opaque and not is_reduction(node)):
            made |= dict.fromkeys(map(root_of, node.all_input_nodes))
        if opaque:
            made[node] = None
        if node.op == "call_function" and is_fusible(node):
            operands = [root_of(i) for i in node.all_input_nodes]
            reads[node] = frozenset().union(*(reads.get(v, {v}) if v not in made else {v} for v in operands))
            if len(node.users) > 1 and len(reads[node]) > INLINED_READS and _is_repeated(node):
                made[node] = None
    return made


def _is_repeated(node: fx.Node) -> bool:
    """Whether what reads the value is larger, so that no kernel computes both in one loop."""
    stack = [node]
    while stack:
        value = stack.pop()
        for user in value.users:
            if is_view(user):
                stack.append(user)
            elif is_fusible(user) and isinstance(user.meta.get("val"), torch.Tensor) and nbytes(user) > nbytes(node):
                return True
    return False


def is_fusible(node: fx.Node) -> bool:
    """Pointwise, by torch's own tags; casts and constants too."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target in _CHEAP


def is_reduction(node: fx.Node) -> bool:
    """Whether the node adds up, or compares, what it reads."""
    return getattr(node.target, "overloadpacket", None) in _REDUCTIONS


_REDUCTIONS = (
    *(aten.sum, aten.mean, aten.prod, aten.amax, aten.amin, aten.max, aten.min, aten.any, aten.all),
    *(aten.argmax, aten.argmin, aten.logsumexp, aten.var, aten.var_mean, aten.std),
    *(aten._softmax, aten._log_softmax, aten._softmax_backward_data, aten._log_softmax_backward_data),
    *(aten.nll_loss_forward, aten.gather),
)
_CHEAP = (
    aten._to_copy.default,
    aten.clone.default,
    aten.full.default,
    aten.full_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.where.self,
    aten.arange.start_step,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.nll_loss_backward.default,
)
