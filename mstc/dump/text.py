"""Graphs as text: stable between runs, so that what a pass does is a readable diff."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from mstc.dump.blocks import WORDS
from mstc.dump.model import Block, Dump, Fold, GraphDump, Node, Stage
from mstc.plan.words import bytes_text, count_text


def node_line(node: Node) -> str:
    """``mul_3 = aten.mul.Tensor(silu, linear_5) : f32[2, 64, 24]``"""
    title = f" {node.title!r}" if node.title else ""
    call = f"{node.op}({node.args})" if node.kind in ("op", "output") else f"{node.kind}{title}"
    return f"{node.name} = {call}" + (f" : {node.value}" if node.value and node.kind != "output" else "")


def graph_text(nodes: Iterable[Node]) -> str:
    """One line per node, in order."""
    return "".join(f"{node_line(n)}\n" for n in nodes)


def stage_diff(before: Stage, after: Stage, context: int = 2) -> str:
    """What a pass did to the graph, as a unified diff; "" where nothing changed."""
    old, new = (graph_text(s.nodes).splitlines() for s in (before, after))
    found = difflib.unified_diff(old, new, before.name or "captured", after.name, n=context, lineterm="")
    return "".join(f"{line}\n" for line in found)


def to_text(dump: Dump) -> str:
    """All graphs: blocks, the captured graph, and what each pass changed."""
    head = [f"{dump.title}\n", f"command: {dump.command}\n"]
    if not dump.graphs:
        head.append("no graph was captured: the function calls no tensor operator\n")
    return "".join([*head, *(part for graph in dump.graphs for part in _graph(graph))])


def _graph(graph: GraphDump) -> Iterator[str]:
    yield f"\n==== {graph.name}\n"
    yield blocks_text(graph.blocks, graph.folds)
    if not graph.stages:
        return
    yield f"\n---- as captured: {len(graph.first)} nodes\n{graph_text(graph.first)}"
    for before, after in pairwise(graph.stages):
        diff = stage_diff(before, after)
        if diff:
            yield f"\n---- {after.name}: {after.fidelity.words}, {_counts(after)}\n{diff}"


def _counts(stage: Stage) -> str:
    found = Counter(e.what for e in stage.edits)
    return "; ".join(f"{what}" + (f" ({n} times)" if n > 1 else "") for what, n in found.items())


# ------------------------------------------------------------------ blocks


def blocks_text(blocks: Sequence[Block], folds: Sequence[Fold]) -> str:
    """The model at a glance, identical layers written once."""
    lines: list[str] = []
    starts = {f.start: f for f in folds}
    i = 0
    while i < len(blocks):
        found = starts.get(i)
        stretch = blocks[i : i + (found.period if found else 1)]
        if found:
            lines.append(f"{found.count} times:")
        lines += [("    " if found else "") + block_line(b) for b in stretch]
        i += found.period * found.count if found else 1
    return "".join(f"{line}\n" for line in lines)


def block_line(block: Block) -> str:
    parts = [block.label, WORDS.get(block.status, block.status)]
    if block.chunks > 1:
        parts.append(f"{block.chunks} chunks")
    if block.flops:
        parts.append(f"{count_text(block.flops)}FLOP")
    if block.nbytes:
        parts.append(bytes_text(block.nbytes))
    return ", ".join(parts)
