"""Sizes in a graph of dynamic lengths are computed from the lengths of its inputs.

Tracing leaves ``sym_size(x, 1)`` wherever the program asks a value for its size. Such a size waits for x, and what is
made with it waits too, so that x and its reader could not stand in one region although no number passes between them.
Every size is a function of the inputs' lengths, and is written as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.sizes import Size, can_evaluate, shape_of, size, symbols_of


def size_by_inputs(gm: fx.GraphModule) -> None:
    """Rewrite each computed size whose lengths some input tells; others stay as they are."""
    graph = gm.graph
    told = set(_told(graph))
    if not told:
        return
    editor = Editor(gm)
    written: dict[Size, fx.Node | int] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        expression = size(value)
        if expression not in written:
            if not (told.issuperset(symbols_of([expression])) and can_evaluate(expression)):
                continue
            written[expression] = editor.number(expression, like=node)
        _use(node, written[expression])


def _use(node: fx.Node, new: fx.Node | int) -> None:
    """Let every user of a size use ``new``."""
    if isinstance(new, fx.Node):
        node.replace_all_uses_with(new, propagate_meta=False)
        return

    def swap(n: fx.Node) -> Any:
        return new if n is node else n

    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, dict(user.kwargs)), swap)


def _told(graph: fx.Graph) -> Iterator[sympy.Symbol]:
    """The lengths that an input is, or has as a size."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = shape_of(value) if isinstance(value, torch.Tensor) else ()
        sizes = (size(value),) if isinstance(value, torch.SymInt) else sizes
        yield from (s for s in sizes if isinstance(s, sympy.Symbol))
