"""Which values reach memory when Inductor makes one kernel of many ops, and who reads them there.

A chain of pointwise ops makes only what something else needs whole: an operand of a matrix product, a result of the
graph, a value of several readers that is too much to compute anew in each. Reductions read such a chain as it is
computed.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping

import torch
import torch.fx as fx

from mstc.graph.costs import nbytes, numel
from mstc.graph.reach import descendants
from mstc.graph.views import is_view, root_of

aten, prims = torch.ops.aten, torch.ops.prims

# The memories that Inductor reads at most to compute a value anew in each of its readers (`realize_reads_threshold`).
INLINED_READS = 4


def in_memory(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes whose values exist in memory when pointwise chains are fused, each once."""
    made = needed_whole(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in reversed(_stored(graph, made)):
        if _is_repeated(node) or _are_apart(_read_at(node, made), order, made):
            made[node] = None
    return made


def needed_whole(graph: fx.Graph) -> dict[fx.Node, None]:
    """The nodes whose values must exist in memory: what something other than a pointwise chain reads or makes."""
    made: dict[fx.Node, None] = {}
    for node in graph.nodes:
        opaque = node.op == "call_function" and not is_fusible(node) and not is_view(node)
        if node.op == "output" or (opaque and not is_reduction(node)):
            made |= dict.fromkeys(map(root_of, node.all_input_nodes))
        if opaque or is_concatenation(node):
            made[node] = None
    return made


def _stored(graph: fx.Graph, made: Mapping[fx.Node, None]) -> list[fx.Node]:
    """The other values with several readers that are computed once all the same, as Inductor decides as it lowers each
    (``StorageBox.should_realize_on_reuse``): of many reads, or on a CPU by an op that takes long. One whose readers
    share a kernel with it still never reaches memory."""
    stored: dict[fx.Node, None] = {}
    reads: dict[fx.Node, frozenset[fx.Node]] = {}
    slow: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not is_fusible(node):
            continue
        operands = {i: root_of(i) for i in node.all_input_nodes}
        inlined = [v for v in operands.values() if v in reads and v not in made and v not in stored]
        # Other parts of one memory are further reads.
        read = (reads[v] if v in inlined else {i if numel(i) != numel(v) else v} for i, v in operands.items())
        reads[node] = frozenset().union(*read)
        if _is_slow_on_cpu(node) or not slow.isdisjoint(inlined):
            slow.add(node)
        if node not in made and len(node.users) > 1 and (len(reads[node]) > INLINED_READS or node in slow):
            stored[node] = None
    return list(stored)


def _are_apart(found: set[fx.Node], order: Mapping[fx.Node, int], made: Mapping[fx.Node, None]) -> bool:
    """Whether the nodes share no loop with what they read: one needs what an op that runs by itself makes of another.

    On a CPU sums have loops of their own, before what needs them. order: of all nodes of the graph.
    """
    if any(_is_sum_on_cpu(n) for n in found):
        return True
    places = sorted(order[n] for n in found)
    window = set(itertools.islice(order, places[0], places[-1] + 1)) if places else set()
    alone = {n for n in window if _is_sum_on_cpu(n) or runs_alone(n, made)}
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


def makes(node: fx.Node, made: Mapping[fx.Node, None] | None) -> bool:
    """Whether a node runs and makes memory of its own, or results that do."""
    runs = node.op == "call_function" and node.target is not operator.getitem and not is_view(node)
    return runs and (made is None or node in made)


def runs_alone(node: fx.Node, made: Mapping[fx.Node, None] | None) -> bool:
    """Whether a node runs by itself: a matrix product, attention, a loop."""
    in_kernel = is_fusible(node) or is_reduction(node) or getattr(node.target, "overloadpacket", None) in _INDEXED
    return makes(node, made) and not in_kernel


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
    """Pointwise, by torch's own tags; casts and constants too."""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags or node.target in _CHEAP


def is_reduction(node: fx.Node) -> bool:
    """Whether the node adds up, or compares, what it reads."""
    return getattr(node.target, "overloadpacket", None) in _REDUCTIONS


def is_concatenation(node: fx.Node) -> bool:
    """Whether it is one whole buffer, into which its operands are written: so on a CPU (``lowering.cat``)."""
    return node.target is aten.cat.default and _is_on_cpu(node)


def _is_slow_on_cpu(node: fx.Node) -> bool:
    """Whether Inductor takes it for one of the ``heavy_ops`` of a CPU."""
    return getattr(node.target, "overloadpacket", None) in _SLOW and _is_on_cpu(node)


def _is_sum_on_cpu(node: fx.Node) -> bool:
    return is_reduction(node) and _is_on_cpu(node)


def _is_on_cpu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, (tuple, list)) else value
    return isinstance(first, torch.Tensor) and first.device.type == "cpu"


_REDUCTIONS = (
    *(aten.sum, aten.mean, aten.prod, aten.amax, aten.amin, aten.max, aten.min, aten.any, aten.all),
    *(aten.argmax, aten.argmin, aten.logsumexp, aten.var, aten.var_mean, aten.std),
    *(aten._softmax, aten._log_softmax, aten._softmax_backward_data, aten._log_softmax_backward_data),
    *(aten.nll_loss_forward, aten.gather),
)
# What is made of exp, log, sigmoid or tanh.
_SLOW = (
    *(aten.exp, aten.log, aten.log2, aten.log10, aten.log1p, aten.sigmoid, aten.tanh, aten.silu, aten.silu_backward),
    *(aten.softplus, aten.softplus_backward, aten.log_sigmoid_forward, aten.mish, aten.logit, aten.gelu_backward),
)
_INDEXED = (
    *(aten.index, aten.index_put, aten._unsafe_index, aten._unsafe_index_put),
    *(aten.embedding, aten.scatter, aten.index_select, prims.iota),
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
    aten.constant_pad_nd.default,
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.slice_backward.default,
    aten.select_backward.default,
    aten.nll_loss_backward.default,
)
