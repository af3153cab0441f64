"""Gradients that a body sums over its tokens leave it in float32.

    dL/db = round(sum over chunks of (sum over the chunk's tokens of dy))

A bias or the scale of a norm in half precision gets the sum of all tokens rounded once, as in eager. A body that
rounded each chunk's sum would add an error per chunk, which a float32 accumulator cannot take back. So the sum is
taken before it is rounded. That of a layer norm y = w x̂ + b, which PyTorch's op takes and rounds itself, is written
out: dL/dw = sum of dy x̂ and dL/db = sum of dy, with x̂ = (x - mean) rstd.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.precision import at_least_float32

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.squeeze.dim, aten.squeeze.dims)


def widened(gradient: fx.Node) -> fx.Node:
    """The gradient, or the sum that it is, seen through views, in at least float32."""
    dtype = at_least_float32(gradient.meta["val"].dtype)
    if dtype is gradient.meta["val"].dtype:
        return gradient
    views: list[fx.Node] = []
    root = gradient
    while root.target in _VIEWS:
        views.insert(0, root)
        root = root.all_input_nodes[0]
    with gradient.graph.inserting_before(gradient.next):
        found = _wide(root, dtype)
        if found is None:
            return gradient
        for view in views:
            found = _call(view.target, found, *view.args[1:])
    return found


def _wide(total: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    """A sum before it is rounded, if it is one."""
    if total.target is aten._to_copy.default and total.kwargs.keys() == {"dtype"}:
        before = total.all_input_nodes[0]
        return before if before.meta["val"].dtype is dtype else None
    if total.target is aten.sum.dim_IntList:
        return _call(total.target, *total.args, **{**total.kwargs, "dtype": dtype})
    if total.target is operator.getitem and total.all_input_nodes[0].target is aten.native_layer_norm_backward.default:
        return _of_layer_norm(total, dtype)
    return None


def _of_layer_norm(total: fx.Node, dtype: torch.dtype) -> fx.Node | None:
    """The gradient of a layer norm's weight (the op's second result) or bias (its third)."""
    dy, x, shape, mean, rstd = total.all_input_nodes[0].args[:5]
    assert isinstance(x, fx.Node) and isinstance(shape, list | tuple)
    rows = list(range(x.meta["val"].dim() - len(shape)))
    if not rows or total.args[1] == 0:
        return None
    if total.args[1] == 1:
        centered = _call(aten.sub.Tensor, _call(aten._to_copy.default, x, dtype=dtype), mean)
        dy = _call(aten.mul.Tensor, _call(aten.mul.Tensor, centered, rstd), dy)
    return _call(aten.sum.dim_IntList, dy, rows, dtype=dtype)


def _call(target: Any, first: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node at the insertion point, with its fake value."""
    node: fx.Node = first.graph.call_function(target, (first, *args), kwargs)
    fake = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*fake[0], **fake[1])
    return node
