"""A graph parted into forward and backward as the lowering parts it, and the bytes held while each of their nodes runs.

Nothing is assumed of an op: what it makes is there until its last reader has run, what the backward reads waits for it,
and gradients stay. So this tells the peak of any graph, run op by op or, as far as `mstc.graph.live` follows Inductor,
with pointwise ops fused; `mstc.plan.memory` tells what other choices would change of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.attention import SDPA
from mstc.graph.copies import copy_of
from mstc.graph.costs import bytes_of, hint
from mstc.graph.editor import Editor
from mstc.graph.fusion import in_memory, makes, readers
from mstc.graph.live import maker_of, results_of, steps
from mstc.graph.views import root_of
from mstc.ops.attention_shape import SHAPE
from mstc.ops.body import Value
from mstc.ops.loop import LOSS_LOOP, is_loop
from mstc.ops.pieces import dense_strides
from mstc.ops.program import Program, program
from mstc.ops.saved import offload_saved, offloads_of
from mstc.plan.attention import workspace_of_kernel
from mstc.plan.memory import Point, Timeline
from mstc.plan.work import chunk_bytes, copied, loop_cost

aten = torch.ops.aten
OFFLOAD = torch.ops.mstc.offload.default
FETCH = torch.ops.mstc.fetch.default
LOOP_BACKWARD = torch.ops.mstc.loop_backward.default
ROLES = ("gradients", "saved", "temporaries")


@dataclass(frozen=True)
class Parts:
    """forward: its results, then what the backward reads of it; backward: None in inference; parameters: bytes of the
    inputs that get gradients; fused: whether pointwise ops will run in the kernels of others."""

    forward: fx.GraphModule
    backward: fx.GraphModule | None
    parameters: int
    fused: bool


@dataclass(frozen=True)
class Ran:
    """A node that ran, and what was held meanwhile."""

    node: fx.Node
    point: Point


@dataclass(frozen=True)
class Schedule:
    """What ran in the forward and in the backward; saved: bytes that wait for the backward, by what made them."""

    forward: tuple[Ran, ...]
    backward: tuple[Ran, ...]
    saved: Mapping[fx.Node, int]

    @property
    def timeline(self) -> Timeline:
        return Timeline(tuple(ran.point for ran in (*self.forward, *self.backward)))


def part(gm: fx.GraphModule, training: bool, lower: str) -> Parts:
    """Forward and backward of a graph in normal form, its loops included. The graph stays as it is.

    lower: what will compile them, "inductor", "aot_eager" or "eager".
    """
    copied, _ = copy_of(gm)
    if any(n.meta["val"].device.type == "meta" for n in _tensors(copied)):
        _attend_by_shape(copied)
    compat.name_constants(copied)
    placeholders = copied.graph.find_nodes(op="placeholder")
    inputs = [_input(n, training) for n in placeholders]
    mode = compat.fake_mode_of([v for v in inputs if isinstance(v, torch.Tensor)])
    with compat.isolated_tracing(mode), torch.set_grad_enabled(training):
        found = compat.parted(copied, inputs, lower, offload_saved if offloads_of(copied) else None)
    needing = [v for v in inputs if isinstance(v, torch.Tensor) and v.requires_grad]
    return Parts(found[0], found[1] if len(found) > 1 else None, sum(map(bytes_of, needing)), lower == "inductor")


def _tensors(gm: fx.GraphModule) -> Iterator[fx.Node]:
    return (n for n in gm.graph.find_nodes(op="placeholder") if isinstance(n.meta.get("val"), torch.Tensor))


def _input(node: fx.Node, training: bool) -> Any:
    value = node.meta["val"]
    needs = isinstance(value, torch.Tensor) and training and node.meta.get("needs_grad")
    return value.detach().requires_grad_() if needs else node.meta.get("number", value)


def _attend_by_shape(gm: fx.GraphModule) -> None:
    """On no device PyTorch would take attention apart into all pairs of tokens. A mask of bools is made one of numbers,
    as for the kernels."""
    editor = Editor(gm)
    for node in gm.graph.find_nodes(op="call_function", target=SDPA):
        mask: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        if mask is not None and mask.meta["val"].dtype == torch.bool:
            dtype = node.meta["val"].dtype
            mask = editor.call(aten._to_copy.default, (mask,), {"dtype": dtype}, like=node)
        both = editor.call(SHAPE, (*node.args[:3], mask), like=node)
        editor.replace_many([(node, editor.getitem(both, 0, like=node))], [node.name], "attention by its shapes")
    editor.finish()


def schedule_of(parts: Parts, kind: str) -> Schedule:
    """What both parts hold, node by node, on a device of this kind, "cpu" or "cuda"."""
    forward = _Part(parts.forward.graph, kind, parts.fused)
    inputs = sum(bytes_of(n.meta.get("val")) for n in forward.inputs)
    resting = {"parameters": parts.parameters, "inputs": inputs - parts.parameters}
    left = {n.name: forward.root(n) for n in forward.results}
    backward = None if parts.backward is None else _Part(parts.backward.graph, kind, parts.fused)
    read = set() if backward is None else {n.name for n in backward.inputs}
    saved = {root for name, root in left.items() if name in read}
    first = [
        Ran(node, _point(node, False, resting, held))
        for node, held in forward.run({}, set(left.values()), dict.fromkeys(saved, "saved"))
    ]
    waiting: dict[fx.Node, int] = {}
    for root in saved & forward.held.keys():
        waiting[maker_of(root)] = waiting.get(maker_of(root), 0) + forward.held[root]
    if backward is None:
        return Schedule(tuple(first), (), waiting)
    entering = backward.entering(left, forward.held)
    returned = sum(size for root, size in forward.held.items() if root not in saved)
    gradients = {backward.root(n) for n in backward.results}
    roles = dict.fromkeys(entering, "saved") | dict.fromkeys(gradients, "gradients")
    then = [
        Ran(node, _point(node, True, resting, held, returned))
        for node, held in backward.run(entering, gradients, roles)
    ]
    return Schedule(tuple(first), tuple(then), waiting)


def _point(
    node: fx.Node, backward: bool, resting: Mapping[str, int], held: Mapping[str, int], returned: int = 0
) -> Point:
    """returned: bytes of results that the caller holds through the backward."""
    return Point(node.name, backward, {**resting, **held, "temporaries": held["temporaries"] + returned})


class _Part:
    """A graph that runs node by node; `held`: bytes by *root*, the node that made the memory a value lies in."""

    def __init__(self, graph: fx.Graph, kind: str, fused: bool) -> None:
        self._graph, self._kind = graph, kind
        self._made = in_memory(graph) if fused else None
        self._readers = readers(graph, self._made)
        self._same: dict[fx.Node, fx.Node] = {}
        self.inputs = graph.find_nodes(op="placeholder")
        self.results = graph.output_node().all_input_nodes
        self.held: dict[fx.Node, int] = {}

    def root(self, node: fx.Node) -> fx.Node:
        node = root_of(node)
        return self._same.get(node, node)

    def entering(self, left: Mapping[str, fx.Node], held: Mapping[fx.Node, int]) -> dict[fx.Node, int]:
        """Bytes of the inputs, given what the other part left, by the names of its results. Several inputs that lie in
        one memory there do so here; those that lie in an input of the other part take none."""
        found: dict[fx.Node, int] = {}
        known: dict[fx.Node, fx.Node] = {}
        for node in self.inputs:
            if node.users and all(reader.target is FETCH for reader in node.users):
                continue  # its bytes are elsewhere
            if node.name not in left:
                found[node] = bytes_of(node.meta.get("val"))  # a gradient that comes in
                continue
            root = left[node.name]
            if root in known:
                self._same[node] = known[root]
            elif root in held:
                known[root] = node
                found[node] = held[root]
        return found

    def run(
        self, entering: Mapping[fx.Node, int], stay: Set[fx.Node], roles: Mapping[fx.Node, str]
    ) -> Iterator[tuple[fx.Node, dict[str, int]]]:
        """Each node that is no view, with the bytes held while it runs, by role ("temporaries" unless told)."""
        reading = self._reading(entering.keys(), stay)
        now = dict.fromkeys(ROLES, 0)

        def take(root: fx.Node, size: int) -> None:
            self.held[root] = size
            now[roles.get(root, "temporaries")] += size

        def drop(root: fx.Node) -> None:
            now[roles.get(root, "temporaries")] -= self.held.pop(root)

        for root, size in entering.items():
            take(root, size)
            if root not in reading and root not in stay:
                drop(root)
        for step in steps(self._graph, self._made, reading):
            for root in (*step.before, *filter(None, [step.over])):
                drop(root)
            if makes(step.node, self._made):
                made = _made(step.node)
                for root, size in made:
                    take(root, size)
                yield step.node, {**now, "temporaries": now["temporaries"] + _work(step.node, self._kind)}
                for root, _ in made:
                    if root not in reading and root not in stay:
                        drop(root)
            for root in step.after:
                drop(root)

    def _reading(self, entering: Set[fx.Node], stay: Set[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
        """The readers of each root that goes when the last of them has run."""
        found: dict[fx.Node, set[fx.Node]] = {}
        for value, nodes in self._readers.items():
            root = self._same.get(value, value)
            if root not in stay and (root in entering or root.op == "call_function"):
                found.setdefault(root, set()).update(nodes)
        return found


def _made(node: fx.Node) -> list[tuple[fx.Node, int]]:
    """The roots that an op makes: itself, or each of its results that is taken out, the others counted with itself."""
    if node.target is OFFLOAD:  # what it returns stands for bytes elsewhere
        return [(node, 0)]
    _, *taken = results_of(node)
    found = [(v, bytes_of(v.meta.get("val"))) for v in taken]
    rest = _bytes_of_all(node.meta.get("val")) - sum(size for _, size in found)
    return [(node, max(rest, 0)), *found]  # an op of higher order tells no value of its own


def _bytes_of_all(value: Any) -> int:
    return sum(map(_bytes_of_all, value)) if isinstance(value, (list, tuple)) else bytes_of(value)


def _work(node: fx.Node, kind: str) -> int:
    """Temporaries of an op: those of loops and of attention are known."""
    if is_loop(node):
        called = program(str(node.args[-1])).example()
        pieces = [*_pairs(called.tokens, node.args[0])]
        work = loop_cost(called, node.target is LOSS_LOOP, called.count).work[0]
        return work + _copied(called, pieces) - _told(called, called.tokens)
    if node.target is LOOP_BACKWARD:
        called = program(str(node.args[-1])).example()
        b, (gradients, tokens, _, kept, *_) = called.backward, node.args
        assert b is not None, "the backward of a loop without one"
        results = (*called.outputs, *called.sums)
        told = [*called.tokens, *(called.outputs[i] for i in (*b.kept, *b.grads) if i < len(called.outputs))]
        pieces = [
            *_pairs([called.tokens[i] for i in b.tokens], tokens),
            *_pairs([called.outputs[i] for i in b.kept], kept),
            *_pairs([results[i] for i in b.grads], [list(gradients)[i] for i in b.grads]),  # type: ignore[arg-type]
        ]
        return loop_cost(called, False, called.count).work[1] + _copied(called, pieces) - _told(called, told)
    return workspace_of_kernel(node, kind)


def _pairs(values: Sequence[Value], nodes: Any) -> Iterator[tuple[Value, fx.Node | None]]:
    return zip(values, nodes, strict=True)


def _told(p: Program, values: Iterable[Value]) -> int:
    """Copies of a chunk's pieces as `loop_cost` counts them: as if everything lay as the loop was traced for it."""
    return sum(copied(v, -(-p.n // p.count), p.n) for v in values)


def _copied(p: Program, pieces: Iterable[tuple[Value, fx.Node | None]]) -> int:
    """Copies of a chunk's pieces, as the values lie here; gradients that do not come in are zeros."""
    length = -(-p.n // p.count)
    total = 0
    for value, node in pieces:
        if node is None or not _is_dense(node.meta["val"], value, length if p.count > 1 else p.n):
            total += chunk_bytes(value, length)
    return total


def _is_dense(whole: torch.Tensor, value: Value, length: int) -> bool:
    """Whether ``length`` indices of a tensor lie densely as a body wants them."""
    shape = [hint(s) for s in whole.shape]
    if value.cut is not None and length != shape[value.cut.dim] // (hint(value.cut.outer) * hint(value.cut.inner)):
        if hint(value.cut.outer) != 1:
            return False
        shape[value.cut.dim] = length * hint(value.cut.inner)
    want = dense_strides(shape, value.order)
    return all(hint(a) == b for a, b, n in zip(whole.stride(), want, shape, strict=True) if n != 1)
