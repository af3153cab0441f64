"""Which values reach memory when Inductor makes one kernel of many ops, and who reads them there.

A chain of pointwise ops makes only what something else needs whole: an operand of a matrix product, a result of the
graph, a value of several readers that is too much to compute anew in each. Reductions read such a chain as it is
computed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.costs import numel
from mstc.graph.reach import descendants
from mstc.graph.views import is_view, root_of

aten, prims = torch.ops.aten, torch.ops.prims


def in_memory(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes whose values exist in memory when pointwise chains are fused, each once."""
    made = needed_whole(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in reversed(_stored(graph, made)):
        if _is_repeated(node, made) or _are_apart(_read_at(node, made), order, made):
            made[node] = None
    return made


def needed_whole(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes whose values must exist in memory: what something other than a pointwise chain reads or makes."""
    made: dict[fx.Node, None] = {}
    for node in graph.nodes:
        opaque = node.op == "call_function" and not is_fusible(node) and not is_view(node)
        if node.op == "output" or (opaque and not _has_loop(node)):
            made |= dict.fromkeys(map(root_of, node.all_input_nodes))
        if opaque or is_concatenation(node):
            made[node] = None
    return made


def _stored(graph: fx.Graph, made: Mapping[fx.Node, None]) -> list[fx.Node]:
    """The other values that are computed once all the same, as Inductor decides as it lowers each: those of several
    readers (``StorageBox.should_realize_on_reuse``) of many reads, or of a long loop or on a CPU by an op that takes
    long, for which one larger reader is several; any of which the loop has grown too long (``has_exceeded_max_reads``).
    One whose readers share a kernel with it still never reaches memory."""
    stored: list[fx.Node] = []
    inlined: dict[fx.Node, _Loop] = {}
    settings = getattr(graph.owning_module, "meta", {}).get("settings")
    limits_on = {on_cpu: compat.loop_limits(on_cpu, settings) for on_cpu in (False, True)}
    for node in graph.nodes:
        if node.op != "call_function" or not is_fusible(node):
            continue
        loop = _loop_of(node, inlined)
        limits = limits_on[_is_on_cpu(node)]
        reads, is_long = len(loop.reads), loop.length > limits.ops
        several = len(node.users) > 1
        again = (several and reads > limits.repeated) or ((several or _is_widened(node)) and (loop.slow or is_long))
        if node not in made and (again or reads > limits.reads or (is_long and reads > 1)):
            stored.append(node)
        elif node not in made:
            inlined[node] = loop
    return stored


@dataclass(frozen=True)
class _Loop:
    """What computes a value: ops, the memories that they read, and whether one of them takes long on a CPU. Where sums
    are written out, each of their terms has ops and reads of its own, told apart by a number."""

    ops: frozenset[tuple[fx.Node, int]]
    reads: frozenset[tuple[fx.Node, int]]
    slow: bool

    @property
    def length(self) -> int:
        """The ops of one turn, as Inductor counts them (``OpCounterCSE``)."""
        return len(self.reads) + sum(_ops_of(node) for node, _ in self.ops)

    def times(self, terms: int) -> _Loop:
        return self if terms == 1 else _Loop(_per_term(self.ops, terms), _per_term(self.reads, terms), self.slow)


def _per_term(found: Iterable[tuple[fx.Node, int]], terms: int) -> frozenset[tuple[fx.Node, int]]:
    return frozenset((node, i * terms + j) for node, i in found for j in range(terms))


def _loop_of(node: fx.Node, inlined: Mapping[fx.Node, _Loop]) -> _Loop:
    """The loop of a node that computes what ``inlined`` has of its operands anew."""
    operands = {i: root_of(i) for i in node.all_input_nodes}
    terms = _terms_written_out(node)
    parts = [inlined[v].times(terms) for v in operands.values() if v in inlined]
    # Other parts of one memory are further reads.
    own = {i if numel(i) != numel(v) else v for i, v in operands.items() if v not in inlined}
    return _Loop(
        _per_term([(node, 0)], terms).union(*(p.ops for p in parts)),
        _per_term([(v, 0) for v in own], terms).union(*(p.reads for p in parts)),
        _is_slow_on_cpu(node) or any(p.slow for p in parts),
    )


def _ops_of(node: fx.Node) -> int:
    """What is computed for one element: the op, and its numbers; where a part is written, also whether it is one."""
    if _packet(node) in _PARTS:
        return 8
    return 1 + sum(isinstance(a, (int, float)) for a in node.args)


def _are_apart(found: set[fx.Node], order: Mapping[fx.Node, int], made: Mapping[fx.Node, None]) -> bool:
    """Whether the nodes share no loop with what they read: one needs what an op that runs by itself makes of another.

    On a CPU sums have loops of their own, before what needs them. order: of all nodes of the graph.
    """
    if any(is_sum_on_cpu(n) for n in found):
        return True
    places = sorted(order[n] for n in found)
    window = set(itertools.islice(order, places[0], places[-1] + 1)) if places else set()
    alone = {n for n in window if is_sum_on_cpu(n) or runs_alone(n, made)}
    for node in found:
        behind = {user for n in descendants([node], window) & alone for user in n.users}
        if not descendants(behind, window).isdisjoint(found):
            return True
    return False


def _read_at(node: fx.Node, made: Mapping[fx.Node, None]) -> set[fx.Node]:
    """The nodes in memory that are made of a value, through views and through what is computed on the way."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user in made or user.op == "output":
                found.add(user)
            elif user not in seen:
                seen.add(user)
                stack.append(user)
    return found


def _is_widened(node: fx.Node) -> bool:
    """Whether an op reads the value several times, beside a larger one."""
    for user in node.users:
        if (is_view(user) or is_fusible(user)) and numel(user) > numel(node):
            return True
        if is_view(user) and _is_widened(user):
            return True
    return False


def _is_repeated(node: fx.Node, made: Mapping[fx.Node, None]) -> bool:
    """Whether what reads the value is larger, so that no kernel computes both in one loop: also what is larger than
    values that are computed on the way. Into a concatenation each operand is written by a loop of its own."""
    stack = [node]
    seen: set[fx.Node] = set()
    while stack:
        for user in stack.pop().users:
            looped = is_fusible(user) and isinstance(user.meta.get("val"), torch.Tensor) and not is_concatenation(user)
            if looped and numel(user) > numel(node):
                return True
            if user not in seen and user not in made and (looped or is_view(user)):
                seen.add(user)
                stack.append(user)
    return False


def makes(node: fx.Node, made: Mapping[fx.Node, None] | None) -> bool:
    """Whether a node runs and makes memory of its own, or results that do."""
    runs = node.op == "call_function" and node.target is not operator.getitem and not is_view(node)
    return runs and (made is None or node in made)


def runs_alone(node: fx.Node, made: Mapping[fx.Node, None] | None) -> bool:
    """Whether a node runs by itself: a matrix product, attention, a loop."""
    return makes(node, made) and not is_fusible(node) and not _has_loop(node)


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
        for value in sources(node, made):
            found.setdefault(value, []).append(node)
    return found


def sources(node: fx.Node, made: Mapping[fx.Node, None] | None) -> set[fx.Node]:
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


def is_fusible(node: fx.Node) -> bool:
    """Pointwise, by torch's own tags; casts, constants, reads at indices, sums of few terms too."""
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _CHEAP:
        return True
    return _packet(node) in _GATHERS or _terms_written_out(node) > 1 or _is_one_of_each_row(node)


def _is_one_of_each_row(node: fx.Node) -> bool:
    """Whether a constant has a number written to one place of each row, which Inductor takes for a comparison with the
    place (``scatter_upon_const_tensor``)."""
    if node.target is not aten.scatter.value:
        return False
    x, dim, index = node.args[:3]
    assert isinstance(x, fx.Node) and isinstance(dim, int) and isinstance(index, fx.Node)
    return x.target is aten.full.default and numel(index) * x.meta["val"].shape[dim] == numel(x)


def is_reduction(node: fx.Node) -> bool:
    """Whether the node adds up, or compares, what it reads."""
    return _packet(node) in _REDUCTIONS


def _has_loop(node: fx.Node) -> bool:
    """Whether Inductor writes a loop for it, in which its operands are computed: over what a reduction adds up, or over
    what is written at indices."""
    return _packet(node) in _SCATTERS or (is_reduction(node) and _terms_written_out(node) == 1)


def _terms_written_out(node: fx.Node) -> int:
    """How many terms of a reduction are written out, so that it is pointwise: few (``Reduction.create``)."""
    if _packet(node) not in _UNROLLED or not numel(node) or (numel(node) == 1 and _is_on_cpu(node)):
        return 1
    terms = numel(node.all_input_nodes[0]) // numel(node)
    return max(terms, 1) if terms < compat.unrolled_below() else 1


def is_concatenation(node: fx.Node) -> bool:
    """Whether it is one whole buffer, into which its operands are written: so on a CPU (``lowering.cat``)."""
    return node.target is aten.cat.default and _is_on_cpu(node)


def _is_slow_on_cpu(node: fx.Node) -> bool:
    """Whether Inductor takes it for one of the ``heavy_ops`` of a CPU."""
    return _packet(node) in _SLOW and _is_on_cpu(node)


def is_sum_on_cpu(node: fx.Node) -> bool:
    """Whether it is a sum with a loop of its own."""
    return is_reduction(node) and _has_loop(node) and _is_on_cpu(node)


def _packet(node: fx.Node) -> object:
    """The op without its overload; None of what is none."""
    return getattr(node.target, "overloadpacket", None)


def _is_on_cpu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) else value
    return isinstance(first, torch.Tensor) and first.device.type == "cpu"


_UNROLLED = (aten.sum, aten.mean, aten.prod, aten.amax, aten.amin, aten.any, aten.all)
_REDUCTIONS = (
    *(*_UNROLLED, aten.max, aten.min),
    *(aten.argmax, aten.argmin, aten.logsumexp, aten.var, aten.var_mean, aten.std),
    *(aten._softmax, aten._log_softmax, aten._softmax_backward_data, aten._log_softmax_backward_data),
    aten.nll_loss_forward,
)
# What is made of exp, log, sigmoid or tanh.
_SLOW = (
    *(aten.exp, aten.log, aten.log2, aten.log10, aten.log1p, aten.sigmoid, aten.tanh, aten.silu, aten.silu_backward),
    *(aten.softplus, aten.softplus_backward, aten.log_sigmoid_forward, aten.mish, aten.logit, aten.gelu_backward),
)
# Written into, or cut out of, what is otherwise constant or another value.
_PARTS = (aten.constant_pad_nd, aten.select_scatter, aten.slice_scatter, aten.slice_backward, aten.select_backward)
# Read at indices, and written at indices into a copy of the first operand.
_GATHERS = (
    *(aten.index, aten._unsafe_index, aten._unsafe_masked_index, aten.index_select, aten.gather),
    *(aten.embedding, prims.iota),
)
_SCATTERS = (
    *(aten.index_put, aten._unsafe_index_put, aten._unsafe_masked_index_put_accumulate),
    *(aten.scatter, aten.scatter_add),
)
_CHEAP = (
    aten._to_copy.default,
    aten.clone.default,
    aten.full.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.where.self,
    aten.arange.start_step,
    aten.cat.default,
    *(packet.default for packet in _PARTS),
    aten.nll_loss_backward.default,
)
