"""Bytes that are live while a traced graph runs, above its inputs.

A value's memory begins with the node that makes it and ends with its last reader; views live in the memory of
what they view. Op by op (``fused`` False) every node makes its value; fused, those of `mstc.graph.fusion` do.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from mstc.graph.costs import nbytes, numel
from mstc.graph.fusion import in_memory, is_concatenation, is_sum_on_cpu, makes, readers, runs_alone, sources
from mstc.graph.reach import ancestors
from mstc.graph.views import is_view, root_of


def peak_bytes(gm: fx.GraphModule, fused: bool = False, pooled: bool = False) -> int:
    """The most bytes live at once while the graph runs, its inputs left out.

    pooled: freed memory stays with a pool that hands it out again for at most half of it (`mstc.ops.workspace`).
    """
    return peaks_of(gm, fused)[pooled]


def peaks_of(gm: fx.GraphModule, fused: bool) -> tuple[int, int]:
    """As `peak_bytes`, without a pool and with one."""
    made = in_memory(gm.graph) if fused else None
    found = {value: nodes for value, nodes in readers(gm.graph, made).items() if value.op == "call_function"}
    live, pool = _Live(), _Pool()
    for step in steps(gm.graph, made, found):
        new = results_of(step.node) if makes(step.node, made) else []
        unread = [v for v in new if v not in found]
        for memory in (live, pool):
            for value in step.before:
                memory.drop(value)
            if step.over is not None:
                memory.rename(step.over, step.node)
            else:
                for value in new:
                    memory.take(value)
            for value in (*step.after, *unread):
                memory.drop(value)
    return live.peak, pool.peak


@dataclass(frozen=True)
class Step:
    """What becomes of memory with a node: values that are gone before it runs, the one that its result is written
    over, values that are gone after it."""

    node: fx.Node
    before: Sequence[fx.Node] = ()
    over: fx.Node | None = None
    after: Sequence[fx.Node] = ()


def steps(
    graph: fx.Graph, made: Mapping[fx.Node, None] | None, reading: Mapping[fx.Node, Collection[fx.Node]]
) -> Iterator[Step]:
    """Each node of a graph, in order.

    made: as of `in_memory`, None for all; reading: the readers of the values that count.

    On a CPU Inductor makes one kernel of all that is fusible between two ops that run by themselves, and frees nothing
    before it is done (``CppScheduling.codegen_node``, ``Scheduler.flush``). On a GPU it makes one of what reads the
    same; that memory may be freed between two of these is left out of account.
    """
    nodes = list(graph.nodes) if made is None else _as_fused(graph, made)
    order = {node: i for i, node in enumerate(nodes)}
    dying: dict[fx.Node, list[fx.Node]] = {}
    for value, found in reading.items():
        dying.setdefault(max(found, key=order.__getitem__), []).append(value)
    waiting: list[fx.Node] = []
    for node in nodes:
        gone = dying.get(node, [])
        if made is None:
            yield Step(node, after=gone)
        elif node.op == "output" or runs_alone(node, made):
            yield Step(node, before=waiting, after=gone)
            waiting = []
        else:
            over = next((v for v in gone if may_write_over(node, v, reading[v], made)), None)
            waiting += (v for v in gone if v is not over)
            yield Step(node, over=over)


def _as_fused(graph: fx.Graph, made: Mapping[fx.Node, None]) -> list[fx.Node]:
    """The nodes in the order in which they run: a node joins the first kernel that starts with all that it reads, if
    another node of it, of the same length, reads or makes some of that (``Scheduler.can_fuse``)."""
    runs: list[list[fx.Node]] = [[]]  # an op that runs by itself, and the kernel behind it
    kernels: list[list[tuple[fx.Node, set[fx.Node]]]] = [[]]  # what each consists of, and the memories that it reads
    place: dict[fx.Node, int] = {}
    for node in graph.nodes:
        at = len(runs) - 1
        alone = node.op == "output" or runs_alone(node, made)
        if makes(node, made) and not alone:
            read = sources(node, made)
            first = max((place.get(v, 0) for v in read), default=at)
            at = next((i for i in range(first, at) if any(_share(node, read, *other) for other in kernels[i])), at)
            kernels[at].append((node, read))
        elif alone:
            runs.append([])
            kernels.append([])
            at += 1
        runs[at].append(node)
        place[node] = at
    return [node for run in runs for node in run]


def _share(node: fx.Node, read: set[fx.Node], other: fx.Node, others: set[fx.Node]) -> bool:
    return (other in read or not read.isdisjoint(others)) and _length(node) == _length(other)


def _length(node: fx.Node) -> int:
    """How many elements a kernel goes through for a node: of what it makes, or of what it adds up."""
    return max(numel(n) for n in (node, *node.all_input_nodes))


def results_of(node: fx.Node) -> list[fx.Node]:
    """What an op makes: itself, or each of its results that is taken out, all there before its operands go."""
    taken = (u for u in node.users if u.target is operator.getitem and not is_view(u))
    return [node, *(value for u in taken for value in results_of(u))]


def maker_of(value: fx.Node) -> fx.Node:
    """The op that made a value, which may be one of its results."""
    while value.target is operator.getitem:
        (value,) = value.all_input_nodes
    return value


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


def may_write_over(
    node: fx.Node, value: fx.Node, reading: Collection[fx.Node], made: Mapping[fx.Node, None] | None
) -> bool:
    """Whether a fused kernel may write ``node`` over ``value`` (``SchedulerNode.decide_inplace_update`` of Inductor).

    Each other reader has run, since ``node`` is made of it or it has a loop of its own before (another that merely
    comes earlier may share the kernel, or wait for it), and each element is written where it was read.
    """
    may = nbytes(value) == nbytes(node) and not is_concatenation(value)
    others = {reader for reader in reading if not _runs_first(reader, node, made)}
    return may and others <= ancestors([node]) and _in_place(node, value, made)


def _runs_first(reader: fx.Node, node: fx.Node, made: Mapping[fx.Node, None] | None) -> bool:
    """Whether a reader is a loop of its own before that of ``node``: it waits for no other loop, or goes through other
    elements, so that no loop around both has it wait."""
    if not is_sum_on_cpu(reader):
        return False
    makers = map(maker_of, sources(reader, made))
    waits = any(makes(maker, made) and not runs_alone(maker, made) for maker in makers)
    return not waits or _length(reader) != _length(node)


def _in_place(node: fx.Node, value: fx.Node, made: Mapping[fx.Node, None] | None) -> bool:
    """Whether ``node`` reads ``value`` in the order that both lie in, also through what is computed on the way."""
    for operand in node.all_input_nodes:
        root = root_of(operand)
        inlined = made is not None and root.op == "call_function" and root not in made
        if root is not value and not (inlined and value in sources(root, made)):
            continue
        if _reordered(operand.meta.get("val"), node.meta.get("val")):
            return False
        if root is not value and not _in_place(root, value, made):
            return False
    return True


def _reordered(read: object, written: object) -> bool:
    """Whether two values of one shape lie in memory in different orders."""
    if not isinstance(read, torch.Tensor) or not isinstance(written, torch.Tensor) or read.shape != written.shape:
        return False
    strides = zip(read.shape, read.stride(), written.stride(), strict=True)
    return any(a != b for size, a, b in strides if size != 1)
