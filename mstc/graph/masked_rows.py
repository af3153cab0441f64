"""``masked_select`` by a mask that is one for whole rows reads rows: x.masked_select(m[:, :, None]) = x[m].flatten().

Both list what is selected in row-major order, and of a selected row that is all of it. The same of ``x[mask]`` with
such a mask. Read so, the selection can move before a head (`mstc.passes.select`). Exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.sizes import Size, same, shape_of, symbols_of

aten = torch.ops.aten

_VIEWS = (aten.unsqueeze.default, aten.view.default, aten.reshape.default)


def read_rows(gm: fx.GraphModule) -> set[sympy.Symbol]:
    """Write selections by masks of whole rows so; the lengths that have another name then, to be measured anew."""
    editor = Editor(gm)
    renamed: set[sympy.Symbol] = set()
    for node in list(gm.graph.nodes):
        given = _masked(node)
        rows = given and _rows(*given)
        if not given or not rows:
            continue
        call = partial(editor.call, like=node)
        mask = _seen_as(given[1], rows) or call(
            aten.reshape.default, (given[1], [editor.number(n, like=node) for n in rows])
        )
        read = call(aten.index.Tensor, (given[0], [mask]))
        renamed.update(symbols_of(shape_of(node.meta["val"])))
        flat = call(aten.reshape.default, (read, [-1]))
        _replace(editor, node, flat)
    return renamed


def _replace(editor: Editor, node: fx.Node, flat: fx.Node) -> None:
    """Let ``flat`` stand for a selection; what asks for its size asks for the number of rows."""
    for user in [u for u in node.users if u.target is aten.sym_size.int]:
        user.replace_all_uses_with(editor.number(shape_of(flat.meta["val"])[0], like=user), propagate_meta=False)
        node.graph.erase_node(user)
    node.replace_all_uses_with(flat, propagate_meta=False)
    node.graph.erase_node(node)


def _masked(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(value, mask) of a selection by a mask of all dimensions, before the mask is repeated."""
    args: Any = node.args
    if node.target is aten.masked_select.default:
        x, mask = args
    elif node.target is aten.index.Tensor and len(args[1]) == 1 and args[1][0].target is aten.expand.default:
        x, mask = args[0], args[1][0]
    else:
        return None
    shape, given = shape_of(x.meta["val"]), shape_of(mask.meta["val"])
    if len(given) != len(shape) or any(not same(m, n) and not same(m, 1) for m, n in zip(given, shape, strict=True)):
        return None  # the value would be repeated
    if mask.target is aten.expand.default:
        mask = mask.args[0]
    return (x, mask) if mask.meta["val"].dim() == len(shape) and mask.meta["val"].dtype is torch.bool else None


def _rows(x: fx.Node, mask: fx.Node) -> tuple[Size, ...]:
    """The first dimensions of x, which the mask tells apart; none where it is not one along all others."""
    shape, given = shape_of(x.meta["val"]), shape_of(mask.meta["val"])
    count = len(given)
    while count and same(given[count - 1], 1):
        count -= 1
    return shape[:count] if all(map(same, given[:count], shape[:count])) else ()


def _seen_as(mask: fx.Node, shape: Sequence[Size]) -> fx.Node | None:
    """What the mask is a view of in this shape, so that equal masks are one node."""
    node = mask
    while True:
        given = shape_of(node.meta["val"])
        if len(given) == len(shape) and all(map(same, given, shape)):
            return node
        if node.target not in _VIEWS:
            return None
        (node,) = node.all_input_nodes
