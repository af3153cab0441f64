"""Losses and means over tokens written as sums over tokens, so that a loop can end in them.

    mean cross-entropy = (sum_t l_t) / (sum_t [target_t is counted] w[target_t])

The per-token losses are what PyTorch returns for reduction "none"; the normalizer does not depend on the
logits and stays outside. With nothing counted the value is nan as in eager, and the gradients are zero.
Equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.precision import at_least_float32
from mstc.graph.rules.call import Call
from mstc.graph.sizes import product, quotient, shape_of
from mstc.ops.pieces import order_of
from mstc.passes.base import Context, Pass
from mstc.report import Fidelity

aten = torch.ops.aten

MEAN, SUM = 1, 2
MEANS = (aten.mean.default, aten.mean.dim)
_LOSSES = (
    aten.cross_entropy_loss.default,
    aten.nll_loss.default,
    aten.nll_loss_nd.default,
    aten.mse_loss.default,
    aten.l1_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.soft_margin_loss.default,
    aten.multi_margin_loss.default,
    aten.kl_div.default,
)
_CLASSIFYING = _LOSSES[:3]


@dataclass(frozen=True)
class LossSite:
    """A loss or mean that reduces over tokens."""

    node: fx.Node


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[LossSite]:
    for node in gm.graph.nodes:
        if node.target not in _LOSSES:
            continue
        if Call(node).arg("reduction", MEAN) in (MEAN, SUM) and node.args[0].meta["val"].dim() > 1:
            yield LossSite(node)
    yield from _means(gm, ctx)


def _means(gm: fx.GraphModule, ctx: Context) -> Iterator[LossSite]:
    """Means over the axis of a region that need gradients."""
    means = [n for n in gm.graph.nodes if n.target in MEANS and n.meta.get("needs_grad")]
    if not means:
        return
    known = ctx.analysis(gm)
    for node in means:
        source = node.args[0]
        for region in known.regions:
            if source in region.proofs and not known.axes.places(node, region.axis):
                yield LossSite(node)
                break


def apply(editor: Editor, site: LossSite, ctx: Context) -> None:
    node = site.node
    if node.target in MEANS:
        new = mean_as_sum(editor, node)
    else:
        new = _loss_as_sum(editor, node)
    editor.replace(node, new, f"{node.target} written as a sum over tokens")


def mean_as_sum(editor: Editor, node: fx.Node, counted: fx.Node | None = None) -> fx.Node:
    """A mean as a sum; counted: of this instead, which has zeros more than what the mean was taken of."""
    call = Call(node)
    source = call.operands[0]
    dtype = node.meta["val"].dtype
    if node.target is aten.mean.default:
        total = editor.call(aten.sum.default, (counted or source,), {"dtype": at_least_float32(dtype)}, like=node)
    else:
        args = (counted or source, call.arg("dim"), call.arg("keepdim", False))
        total = editor.call(aten.sum.dim_IntList, args, {"dtype": at_least_float32(dtype)}, like=node)
    count = quotient(product(shape_of(source.meta["val"])), product(shape_of(node.meta["val"])))
    mean = editor.call(aten.div.Tensor, (total, editor.number(count, like=node)), like=node)
    return _cast(editor, mean, dtype, node)


def _loss_as_sum(editor: Editor, node: fx.Node) -> fx.Node:
    call = Call(node)
    reduction = call.arg("reduction", MEAN)
    each = _per_token(editor, call)
    dtype = node.meta["val"].dtype
    total = editor.call(aten.sum.default, (each,), {"dtype": at_least_float32(dtype)}, like=node)
    if reduction == MEAN:
        total = _divide(editor, call, total, each)
    return _cast(editor, total, dtype, node)


def _per_token(editor: Editor, call: Call) -> fx.Node:
    """The same loss with reduction "none"."""
    changed = {"reduction": 0} | _classes_last(editor, call)
    given = [(a, changed.get(a.name, call.arg(a.name))) for a in call.target._schema.arguments]
    args = tuple(value for a, value in given if not a.kwarg_only)
    return editor.call(call.target, args, {a.name: value for a, value in given if a.kwarg_only}, like=call.node)


def _classes_last(editor: Editor, call: Call) -> dict[str, fx.Node]:
    """Of a loss with classes in dimension 1 the arguments as rows of classes, where they lie in memory so.

    So they lie behind a head, and its gradient can be written over the logits only if the classes are last there too.
    """
    scores, target = call.operands[0], call.arg("target")
    value = scores.meta["val"]
    if call.target not in _CLASSIFYING or value.dim() < 3:
        return {}
    order = [0, *range(2, value.dim()), 1]
    if order_of(value) != tuple(order):
        return {}
    by_class = not target.meta["val"].is_floating_point()

    def rows(x: fx.Node) -> fx.Node:
        moved = editor.call(aten.permute.default, (x, order), like=call.node)
        return editor.call(aten.reshape.default, (moved, [-1, value.shape[1]]), like=call.node)

    targets = editor.call(aten.reshape.default, (target, [-1]), like=call.node) if by_class else rows(target)
    return {call.target._schema.arguments[0].name: rows(scores), "target": targets}


def _divide(editor: Editor, call: Call, total: fx.Node, each: fx.Node) -> fx.Node:
    node, target = call.node, call.arg("target")
    by_class = node.target in _CLASSIFYING and not target.meta["val"].is_floating_point()
    if not by_class:
        # Class probabilities: the mean is over tokens; other losses: over elements.
        count = editor.number(product(shape_of(each.meta["val"])), like=node)
        return editor.call(aten.div.Tensor, (total, count), like=node)
    wide = total.meta["val"].dtype
    counted = editor.call(aten.ne.Scalar, (target, call.arg("ignore_index", -100)), like=node)
    weight = call.arg("weight")
    if weight is None:
        norm = editor.call(aten.sum.default, (counted,), like=node)
    else:
        safe = editor.call(aten.where.ScalarOther, (counted, target, 0), like=node)
        flat = editor.call(aten.reshape.default, (safe, [-1]), like=node)
        picked = editor.call(aten.index_select.default, (weight, 0, flat), like=node)
        mask = editor.call(aten.reshape.default, (counted, [-1]), like=node)
        norm = editor.call(aten.sum.default, (editor.call(aten.mul.Tensor, (picked, mask), like=node),), like=node)
    norm = editor.call(aten._to_copy.default, (norm,), {"dtype": wide}, like=node)
    empty = editor.call(aten.eq.Scalar, (norm, 0), like=node)
    safe_norm = editor.call(aten.masked_fill.Scalar, (norm, empty, 1), like=node)
    mean = editor.call(aten.div.Tensor, (total, safe_norm), like=node)
    return editor.call(aten.masked_fill.Scalar, (mean, empty, float("nan")), like=node)


def _cast(editor: Editor, value: fx.Node, dtype: torch.dtype, like: fx.Node) -> fx.Node:
    if value.meta["val"].dtype == dtype:
        return value
    return editor.call(aten._to_copy.default, (value,), {"dtype": dtype}, like=like)


TOKEN_LOSSES = Pass("token_losses", "lm_head", Fidelity.ROUNDING, find, apply)

__all__ = ["MEANS", "TOKEN_LOSSES", "LossSite", "mean_as_sum"]
