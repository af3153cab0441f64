"""``x[arange(n), i]`` takes one element of each row: a gather, of which each row needs only itself.

    x[arange(n), i] = x.gather(1, i[:, None])[:, 0],   and so with more dimensions of rows, and for writes

An index may be negative, a gather's may not, so it is counted from the front first. Exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.sizes import Size, same, shape_of

aten = torch.ops.aten

_VIEWS = (aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.alias.default)
_ARANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)


@dataclass(frozen=True)
class _Read:
    """``node`` reads or writes one element of each row of ``x``, at ``index`` along its last dimension."""

    node: fx.Node
    x: fx.Node
    index: fx.Node

    @property
    def shape(self) -> tuple[Size, ...]:
        return shape_of(self.x.meta["val"])


def read_own_rows(gm: fx.GraphModule) -> None:
    """Write such reads as gathers, and such writes as scatters."""
    editor = Editor(gm)
    for node in list(gm.graph.nodes):
        found = _found(node)
        if found is None:
            continue
        new = _gather(editor, found) if node.target is aten.index.Tensor else _scatter(editor, found)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)


def _found(node: fx.Node) -> _Read | None:
    if node.target not in (aten.index.Tensor, aten.index_put.default):
        return None
    args: Any = node.args
    x, given = args[0], args[1]
    shape, rank = shape_of(x.meta["val"]), len(given) - 1
    if rank < 1 or len(given) != len(shape) or not all(isinstance(g, fx.Node) for g in given):
        return None
    *rows, index = given
    values = [g.meta["val"] for g in given]
    if any(v.dim() > rank or v.dtype in (torch.bool, torch.uint8) for v in values):
        return None
    counts = (_counts(g, shape[d], rank - 1 - d) for d, g in enumerate(rows))
    return _Read(node, x, index) if all(counts) else None


def _counts(node: fx.Node, n: Size, behind: int) -> bool:
    """Whether the values are 0, 1, ... n - 1 along the dimension with so many behind it."""
    sizes = shape_of(node.meta["val"])
    at = len(sizes) - 1 - behind
    if at < 0 or not same(sizes[at], n) or any(not same(s, 1) for d, s in enumerate(sizes) if d != at):
        return False
    while node.target in _VIEWS:
        (node, *_) = node.all_input_nodes
    if node.target not in _ARANGES:
        return False
    start = 0 if node.target is aten.arange.default else node.args[0]
    step = node.args[2] if node.target is aten.arange.start_step and len(node.args) > 2 else 1
    return (start, step) == (0, 1) and same(shape_of(node.meta["val"])[0], n)


def _gather(editor: Editor, read: _Read) -> fx.Node:
    last = len(read.shape) - 1
    taken = editor.call(aten.gather.default, (read.x, last, _column(editor, read, read.index)), like=read.node)
    return editor.call(aten.squeeze.dim, (taken, last), like=read.node)


def _scatter(editor: Editor, read: _Read) -> fx.Node:
    args: Any = read.node.args
    op = aten.scatter_add.default if len(args) > 3 and args[3] else aten.scatter.src
    last, index = len(read.shape) - 1, _column(editor, read, read.index)
    return editor.call(op, (read.x, last, index, _whole(editor, read, args[2])), like=read.node)


def _column(editor: Editor, read: _Read, index: fx.Node) -> fx.Node:
    """The index of each row, counted from the front, as a dimension of length 1."""
    call = partial(editor.call, like=read.node)
    if index.meta["val"].dtype != torch.int64:
        index = call(aten._to_copy.default, (index,), {"dtype": torch.int64})
    n = editor.number(read.shape[-1], like=read.node)
    index = call(aten.where.self, (call(aten.lt.Scalar, (index, 0)), call(aten.add.Tensor, (index, n)), index))
    return _whole(editor, read, index)


def _whole(editor: Editor, read: _Read, value: fx.Node) -> fx.Node:
    """A value of each row, where it was one for several, with a dimension of length 1 behind."""
    rows: Sequence[Any] = [editor.number(n, like=read.node) for n in read.shape[:-1]]
    if not (value.meta["val"].dim() == len(rows) and all(map(same, shape_of(value.meta["val"]), read.shape))):
        value = editor.call(aten.expand.default, (value, rows), like=read.node)
    return editor.call(aten.unsqueeze.default, (value, -1), like=read.node)
