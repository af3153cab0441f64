"""``tril`` and ``triu`` written as a comparison of positions, row by row.

    tril(x, d)[i, j] = x[i, j] if j - i <= d else 0,    triu(x, d)[i, j] = x[i, j] if j - i >= d else 0

A triangle compares a row's number with a column's, which a piece of the rows does not know; the positions, which are
cut with the rows, do. So a mask made by a triangle can be made for a few queries at a time. Exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.rules.call import Call
from mstc.passes.base import Context, Pass
from mstc.report import Fidelity

aten = torch.ops.aten

_COMPARE = {aten.tril.default: aten.le.Scalar, aten.triu.default: aten.ge.Scalar}


@dataclass(frozen=True)
class TriangleSite:
    """A call of ``tril`` or ``triu``."""

    node: fx.Node


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[TriangleSite]:
    for target in _COMPARE:
        for node in gm.graph.find_nodes(op="call_function", target=target):
            if all(isinstance(s, int) for s in node.meta["val"].shape[-2:]):
                yield TriangleSite(node)


def apply(editor: Editor, site: TriangleSite, ctx: Context) -> None:
    node = site.node
    x = editor.resolve(node.args[0])  # type: ignore[arg-type]
    value = node.meta["val"]

    def positions(dim: int) -> fx.Node:
        made = editor.call(aten.arange.default, (value.shape[dim],), {"device": value.device}, like=node)
        return editor.call(aten.unsqueeze.default, (made, 1 if dim == -2 else 0), like=node)

    beyond = editor.call(aten.sub.Tensor, (positions(-1), positions(-2)), like=node)
    inside = editor.call(_COMPARE[node.target], (beyond, int(Call(node).arg("diagonal"))), like=node)  # type: ignore[index]
    outside = False if value.dtype is torch.bool else 0  # a number would make flags int64
    new = editor.call(aten.where.ScalarOther, (inside, x, outside), like=node)
    editor.replace(node, new, f"{node.name} compares positions")


TRIANGLES = Pass("triangles", "query_chunks", Fidelity.EXACT, find, apply)
