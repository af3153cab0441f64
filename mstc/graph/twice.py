"""Masks, positions and labels that a program computes twice are computed once.

``logits[labels > 0]`` and ``labels[labels > 0]`` have equally many rows, and nothing but their masks says so: each has,
traced, a length of its own, and no region could hold both. Here equal masks become one node, and what is read through
one mask has one length. Exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import sympy
import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.editor import Editor, has_order
from mstc.graph.sizes import shape_of, size

aten = torch.ops.aten


def compute_once(gm: fx.GraphModule, renamed: Collection[sympy.Symbol] = ()) -> None:
    """Let equal integers and truth values be one node, and lengths one symbol where they are equal for that reason.

    renamed: lengths that have another name already; values of such lengths are measured anew.
    """
    editor = Editor(gm)
    known: dict[Any, fx.Node] = {}
    rows: dict[fx.Node, Any] = {}
    equal = set(renamed)  # lengths that have another name now
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if equal.intersection(_symbols(node.meta.get("val"))):
            editor.measure(node)
        if _may_merge(node):
            first = known.setdefault(_key(node), node)
            if first is not node:
                equal.update(set(_symbols(node.meta["val"])) - set(_symbols(first.meta["val"])))
                node.replace_all_uses_with(first, propagate_meta=False)
                gm.graph.erase_node(node)
                continue
        mask = _mask_of(node)
        if mask is not None:
            shape, dim = list(node.meta["val"].shape), node.args[1].index(mask)
            first_length = rows.setdefault(mask, shape[dim])
            if size(first_length) != size(shape[dim]):
                equal.update(_symbols(shape[dim]))
                shape[dim] = first_length
                editor.measure(node, shape)


def _may_merge(node: fx.Node) -> bool:
    """What the graph returns stays as it is: the caller may write to one of two."""
    value = node.meta.get("val")
    if not isinstance(node.target, compat.OpOverload) or has_order(node) or not isinstance(value, torch.Tensor):
        return False
    if value.is_floating_point() or value.is_complex():
        return False
    return all(user.op != "output" for user in node.users)


def _key(node: fx.Node) -> Any:
    return (node.target, _frozen(node.args), _frozen(node.kwargs), node.meta.get("ac_graph_id"))


def _frozen(value: Any) -> Any:
    """A value that can be compared: 1, 1.0 and True are three."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return type(value), value


def _mask_of(node: fx.Node) -> fx.Node | None:
    """The mask by which the node reads rows of a value."""
    if node.target is not aten.index.Tensor:
        return None
    given = [g for g in node.args[1] if isinstance(g, fx.Node)]  # type: ignore[union-attr]
    return given[0] if len(given) == 1 and given[0].meta["val"].dtype is torch.bool else None


def _symbols(value: Any) -> Iterable[sympy.Symbol]:
    """The lengths in a value's shape, or in a number."""
    if isinstance(value, (list, tuple)):
        return {s for v in value for s in _symbols(v)}
    sizes = shape_of(value) if isinstance(value, torch.Tensor) else (size(value),)
    if isinstance(value, torch.SymBool):
        sizes = (value.node.expr,)
    return {s for n in sizes if isinstance(n, sympy.Basic) for s in n.free_symbols}
