"""The gradient of a log-softmax without a pass over all classes for a sum that is known.

    dx = dy - exp(y) * sum(dy over classes),   y = log_softmax(x)

Where dy comes from a negative log-likelihood, or from picking one class per row (``gather``), each row of it has one
entry that is not zero, so the sum is that entry; a picked entry is written as a comparison with the class's number,
where ``scatter_add`` into zeros would be a buffer of all classes. A compiler that fuses pointwise operations computes
the sum over again, class by class: with a large vocabulary that costs as much as the rest of the loss. Terms that are
the same for all classes but for a weight per class (label smoothing) are added up as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.precision import at_least_float32
from mstc.ops.writer import Writer

aten = torch.ops.aten
_ZEROS = (aten.new_zeros.default, aten.zeros.default, aten.zeros_like.default)


def use_class_sums(graph: fx.Graph) -> None:
    """Write out log-softmax gradients whose sums over classes are known."""
    picked = _place_picked(graph)
    for node in graph.find_nodes(op="call_function", target=aten._log_softmax_backward_data.default):
        dy, y, dim, dtype = node.args
        value = node.meta["val"]
        if dim % max(value.dim(), 1) != value.dim() - 1:
            continue
        write = Writer(node)
        total = _sum_over_classes(write, dy, picked)
        if total is None:
            continue
        wide = at_least_float32(value.dtype)
        part = write(aten.mul.Tensor, write(aten.exp.default, write.cast(y, wide)), write.cast(total, wide))
        new = write.cast(write(aten.sub.Tensor, write.cast(dy, wide), part), dtype)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _place_picked(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """``zeros.scatter_add(-1, index, x)`` with one index per row, as ``where(class == index, x, 0)``.

    Returns x for each such value: its sum over the classes, since every index is a class (``gather`` saw to that).
    """
    picked = {}
    for node in graph.find_nodes(op="call_function", target=aten.scatter_add.default):
        base, dim, index, x = node.args
        value, indices = node.meta["val"], index.meta["val"]
        last = dim % max(value.dim(), 1) == value.dim() - 1 and isinstance(value.shape[-1], int)
        one = (*value.shape[:-1], 1) == tuple(indices.shape) == tuple(x.meta["val"].shape)
        if base.target not in _ZEROS or not (last and one):
            continue
        write = Writer(node)
        classes = write(aten.arange.default, value.shape[-1], device=value.device)
        new = write(aten.where.ScalarOther, write(aten.eq.Tensor, classes, index), x, 0)
        picked[new] = x
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return picked


def _sum_over_classes(write: Writer, dy: Any, picked: Mapping[fx.Node, fx.Node]) -> fx.Node | None:
    """The sum of a gradient over its last dimension, that dimension kept with size 1; None where it is not known."""
    if not isinstance(dy, fx.Node):
        return None
    if dy.target is aten.nll_loss_backward.default:
        return _entry(write, dy)
    if dy in picked:
        return picked[dy]
    if dy.target is aten.add.Tensor and not dy.kwargs and all(_same_shape(a, dy) for a in dy.args):
        parts = [_sum_over_classes(write, a, picked) for a in dy.args]
        return None if None in parts else write(aten.add.Tensor, *parts)
    classes = dy.meta["val"].shape[-1]
    if dy.target is aten.mul.Tensor:
        for x, weights in (dy.args, dy.args[::-1]):
            same = _same_for_all_classes(x)
            if same is not None and _is_one_row(weights, classes):
                return write(aten.mul.Tensor, same, write(aten.sum.default, weights))
    same = _same_for_all_classes(dy)
    return None if same is None or not isinstance(classes, int) else write(aten.mul.Scalar, same, classes)


def _same_for_all_classes(x: Any) -> fx.Node | None:
    """The column that a value repeats for every class."""
    if not isinstance(x, fx.Node) or x.target is not aten.expand.default:
        return None
    column: Any = x.args[0]
    value = column.meta["val"]
    return column if value.dim() == x.meta["val"].dim() and value.shape[-1] == 1 else None


def _is_one_row(x: Any, classes: object) -> bool:
    """Whether a value is one row of all classes."""
    if not isinstance(x, fx.Node):
        return False
    *rows, last = x.meta["val"].shape or (0,)
    return isinstance(last, int) and last == classes and all(n == 1 for n in rows)


def _same_shape(x: Any, like: fx.Node) -> bool:
    return isinstance(x, fx.Node) and x.meta["val"].shape == like.meta["val"].shape


def _entry(write: Writer, nll: fx.Node) -> fx.Node | None:
    """Of each row of a negative log-likelihood's gradient, the entry at the target: -weight[target] * gradient."""
    gradient, logp, target, weight, reduction, ignored, _ = nll.args
    if reduction != 0 or not isinstance(logp, fx.Node) or logp.meta["val"].dim() != 2:
        return None
    left_out = write(aten.eq.Scalar, target, ignored)
    entry = write(aten.neg.default, gradient)
    if weight is not None:
        counted = write(aten.masked_fill.Scalar, target, left_out, 0)
        entry = write(aten.mul.Tensor, entry, write(aten.index.Tensor, weight, [counted]))
    return write(aten.unsqueeze.default, write(aten.masked_fill.Scalar, entry, left_out, 0), 1)
