"""Wide values are computed where they are read.

A loss over many classes makes probabilities, their products and a gradient, each as large as the scores. A compiler
that fuses pointwise operations keeps such values in registers, unless several kernels read one that is dear: then it
is written to memory (Inductor on a CPU does so with every ``exp``, ``log``, ``tanh`` and ``sigmoid``). Here each
reader gets a copy of its own, computed from the scores that are in memory anyway; long chains are left whole; and
the gradient comes last, so that it can be written over the scores.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.costs import factors_of, is_heavy, numel
from mstc.graph.fusion import is_fusible, needed_whole
from mstc.graph.reach import ancestors, descendants
from mstc.graph.results import returned_by
from mstc.graph.views import is_view, root_of
from mstc.ops.writer import Writer

aten = torch.ops.aten

# A matrix product widens its tokens if its result has so many times the elements of its left operand.
WIDENS = 8
# Copies of a value have at most so many operations each.
LONGEST_CHAIN = 64
# Inductor's configuration for such a body: from how many reads and operations on it writes a value with one reader
# to memory. What several read stays as it is: a value per token, once inlined, would read the scores at two places.
SETTINGS = {"realize_acc_reads_threshold": 64, "realize_opcount_threshold": 256}
# No more copies than this in a body, however its values depend on each other.
MOST_COPIES = 256

_DEAR = tuple(
    getattr(aten, name).default
    for name in ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sigmoid", "tanh", "erf", "sqrt", "rsqrt")
)
# What consists of pointwise operations and reductions, but is one operation for autograd.
_COMPOSITE = tuple(
    getattr(aten, name)
    for name in (
        *("_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data", "logsumexp"),
        *("log_sigmoid_forward", "log_sigmoid_backward", "logaddexp", "xlogy", "softplus", "softplus_backward"),
        *("sigmoid_backward", "tanh_backward", "gelu", "gelu_backward", "silu", "silu_backward"),
        *("binary_cross_entropy", "binary_cross_entropy_backward", "binary_cross_entropy_with_logits"),
        *("mse_loss", "mse_loss_backward", "smooth_l1_loss", "smooth_l1_loss_backward"),
        *("huber_loss", "huber_loss_backward", "addcmul", "addcdiv", "threshold_backward"),
    )
)


def compute_where_read(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """The same function with its wide values computed where they are read; ``gm`` itself where it has none."""
    widest = max(map(numel, filter(_widens, gm.graph.nodes)), default=0)
    if not widest:
        return gm
    whole = compat.trace_flat(gm, inputs, compat.get_decompositions(_COMPOSITE))
    graph = whole.graph
    graph.eliminate_dead_code()
    wide = {n for n in graph.nodes if n.op == "call_function" and numel(n) * WIDENS >= widest}
    for gradient in [n for n in needed_whole(graph) if n in wide and is_fusible(n)]:
        _come_last(gradient, wide)
    _copy_per_reader(graph, wide)
    graph.lint()
    whole.recompile()
    whole.meta["settings"] = SETTINGS
    return whole


def _widens(node: fx.Node) -> bool:
    if not numel(node) or not is_heavy(node):  # a body that was not traced has no values
        return False
    left = factors_of(node)[0]
    return isinstance(left, fx.Node) and numel(node) >= WIDENS * numel(left)


def _come_last(gradient: fx.Node, wide: set[fx.Node]) -> None:
    """Have a value of all classes wait for the small results of the body that do not need it.

    Losses read the scores too. Once they are done nothing does but the gradient, and a compiler can write it over
    the scores; in another order it takes a buffer of all classes more. No value changes: both branches are the same.
    """
    found = _narrow_operand(gradient, wide)
    if found is None:
        return
    reader, operand = found
    graph = gradient.graph
    earlier = set(itertools.takewhile(lambda n: n is not reader, graph.nodes))
    after_wide = descendants(wide & earlier, earlier)
    results = dict.fromkeys(root_of(r) for r in returned_by(graph) if isinstance(r, fx.Node))
    write, x = Writer(reader), operand
    for result in (r for r in results if r in after_wide and r not in wide):
        done = write(aten.isnan.default, write(aten.sum.default, result))
        x = write(aten.where.self, done, x, x)
    reader.replace_input_with(operand, x)


def _narrow_operand(gradient: fx.Node, wide: set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The nearest operand of a pointwise chain that is not of all classes, and the node of the chain that reads it."""
    waiting, seen = deque([gradient]), {gradient}
    while waiting:
        reader = waiting.popleft()
        for operand in reader.all_input_nodes:
            if root_of(operand) not in wide and operand.meta["val"].is_floating_point():
                return reader, operand
            if operand not in seen and (is_fusible(operand) or is_view(operand)):
                seen.add(operand)
                waiting.append(operand)
    return None


def _copy_per_reader(graph: fx.Graph, wide: set[fx.Node]) -> None:
    """Copy dear pointwise values of all classes, so that each has one reader."""
    inlined = _inlined(graph)
    dear = descendants([n for n in inlined if n.target in _DEAR], inlined)
    short = {n for n in wide & dear if len(ancestors([n], inlined)) <= LONGEST_CHAIN}
    left = MOST_COPIES
    for node in reversed([n for n in graph.nodes if n in short]):
        readers = list(node.users)[1:]
        if len(readers) > left:
            continue
        left -= len(readers)
        for reader in readers:
            with graph.inserting_before(reader):
                copy = graph.node_copy(node)
            copy.meta = dict(node.meta)
            reader.replace_input_with(node, copy)


def _inlined(graph: fx.Graph) -> set[fx.Node]:
    """What is computed in the kernels that read it."""
    held = needed_whole(graph)
    calls = [n for n in graph.nodes if n.op == "call_function" and (is_view(n) or is_fusible(n))]
    return {n for n in calls if root_of(n) not in held}
