"""A dump, and the difference of two, in a terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from mstc.cli.console import make_table
from mstc.dump.blocks import WORDS
from mstc.dump.diff import Difference, GraphDifference
from mstc.dump.model import Block, Dump, GraphDump
from mstc.plan.words import bytes_text, count_text

__all__ = ["print_difference", "print_dump"]

_COLOURS = {
    "chunked": "green", "loss": "cyan", "recomputed": "magenta", "rewritten": "yellow", "refused": "red", "kept": "dim"
}  # fmt: skip
_LOOPED = ("chunked", "loss", "recomputed")  # a loop may run in one chunk: what is inside it is not kept
_MOST_REFUSALS = 20


def print_dump(dump: Dump, console: Console, page: Path | None) -> None:
    console.print(Text.assemble((dump.title, "bold"), f"  {len(dump.graphs)} graph(s) in {dump.seconds:.1f} s"))
    if not dump.graphs:
        console.print("No graph was captured: the function calls no tensor operator.")
    for graph in dump.graphs:
        _print_graph(graph, console)
    for m in dump.measured:
        console.print(f"measured peak of one step above rest: {bytes_text(m.peak)} by {m.system} on {m.device}")
    if page is not None:
        console.print(f"page: {page}", markup=False, soft_wrap=True)


def _print_graph(graph: GraphDump, console: Console) -> None:
    console.print(_blocks(graph))
    before, after = graph.before.peak, graph.after.peak
    if before:
        console.print(f"predicted peak of one step: {bytes_text(before)} as written, {bytes_text(after)} rewritten")
    changed = [f"{s.name} ({len(s.edits)} edits, {s.seconds:.2f} s)" for s in graph.stages[1:] if s.edits]
    console.print(f"passes: {', '.join(changed) or 'none changed anything'}; numbers: {graph.fidelity.words}")
    reasons = Counter((r.pass_name, r.reason, r.remedy) for r in graph.refusals)
    for (name, reason, remedy), count in list(reasons.items())[:_MOST_REFUSALS]:
        times = f" ({count} times)" if count > 1 else ""
        console.print(Text.assemble(("why not ", "red"), (name, "bold"), f": {reason}{times}"))
        if remedy:
            console.print(f"        what would make it work: {remedy}", markup=False)
    if len(reasons) > _MOST_REFUSALS:
        console.print(f"and {len(reasons) - _MOST_REFUSALS} more reasons")


def _blocks(graph: GraphDump) -> Table:
    """The model at a glance, identical layers once."""
    columns = ("block", "what happened", "chunks", "tokens", "FLOPs", "bytes made", "at once")
    table = make_table(escape(graph.name), *columns, words=["what happened"])
    starts = {f.start: f for f in graph.folds}
    position = 0
    while position < len(graph.blocks):
        fold = starts.get(position)
        if fold:
            table.add_section()
            table.add_row(Text(f"{fold.count} identical layers of", style="bold"))
        for block in graph.blocks[position : position + (fold.period if fold else 1)]:
            table.add_row(*_row(block, indent=bool(fold)))
        if fold:
            table.add_section()
        position += fold.period * fold.count if fold else 1
    return table


def _row(block: Block, indent: bool) -> list[Text]:
    looped = block.chunks > 1 or block.status in _LOOPED
    return [
        Text(("  " if indent else "") + block.label),
        Text(WORDS.get(block.status, block.status), style=_COLOURS[block.status]),
        Text(str(block.chunks) if looped else ""),
        Text(block.tokens),
        Text(count_text(block.flops).strip() if block.flops else ""),
        Text(bytes_text(block.nbytes) if block.nbytes else ""),
        Text(bytes_text(block.held) if looped else ""),
    ]


def print_difference(found: Difference, console: Console, page: Path | None) -> None:
    if found.same:
        console.print("The two dumps say the same.")
    if found.settings:
        console.print(_pairs("settings", found.settings, found))
    for graph in found.graphs:
        _print_graph_difference(graph, found, console)
    if page is not None:
        console.print(f"page: {page}", markup=False, soft_wrap=True)


def _print_graph_difference(graph: GraphDifference, found: Difference, console: Console) -> None:
    console.print(_pairs(graph.name, graph.figures, found))
    for side, lines in (("A", graph.only_a), ("B", graph.only_b)):
        for line in lines[:_MOST_REFUSALS]:
            console.print(Text(f"refused in {side} only: {line}"))
    changed = [x for x in graph.text.splitlines() if x.startswith(("+", "-")) and not x.startswith(("+++", "---"))]
    console.print(f"rewritten graph: {len(changed)} lines differ" if changed else "rewritten graph: the same")


def _pairs(title: str, pairs: dict[str, tuple[str, str]], found: Difference) -> Table:
    table = make_table(escape(title), "", f"A: {escape(found.a)}", f"B: {escape(found.b)}")
    for name, (a, b) in pairs.items():
        style = "" if a == b else "yellow"
        table.add_row(Text(name), Text(a, style=style), Text(b, style=style))
    return table
