"""Attention without a mask of all pairs, as a fused op says it: the call, and what its form for a window takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from mstc.graph.attention import SDPA, WINDOW_ATTENTION
from mstc.graph.editor import Editor
from mstc.graph.predicates.call import Call, shape_of
from mstc.graph.predicates.facts import MaskFact, Seen, Vector
from mstc.ops.window_attention import EVERYTHING

aten = torch.ops.aten


def window_obstacle(call: Call) -> str:
    """Why ``mstc::window_attention`` cannot stand for ``scaled_dot_product_attention``, "" if it can."""
    q, k, v = (shape_of(call.node_arg(n)) for n in range(3))
    if call.get("dropout_p"):
        return "dropout needs all pairs"
    if not len(q) == len(k) == len(v) == 4:
        return "the operands have other dimensions than batch, heads, tokens and features"
    if q[2] != k[2]:
        return "there are not provably as many queries as keys"
    if q[0] != k[0] or q[3] != k[3] or k[:3] != v[:3] or q[1] % k[1] != 0:
        return "the operands differ in batch, heads or features"
    return ""


def fused_call(
    editor: Editor, operands: tuple[Any, Any, Any], fact: MaskFact, like: fx.Node, dropout: Any = 0.0, **keywords: Any
) -> fx.Node:
    """Attention of (q, k, v) to the pairs of a mask; of documents and padding where the fact tells how to compute them.

    keywords: ``scale`` and ``enable_gqa`` of ``scaled_dot_product_attention``, where they are given.
    """
    if fact.window is None and fact.ids is None and fact.seen is None:
        return editor.call(SDPA, (*operands, None, dropout, fact.causal), keywords, like=like)
    settings: dict[str, Any] = {"scale": keywords.get("scale")}
    if fact.ids is not None:
        settings["documents"] = _by_position(editor, fact.ids, like)
    if fact.seen is not None:
        settings["seen"] = _seen(editor, fact.seen, like)
    window = EVERYTHING if fact.window is None else fact.window
    return editor.call(WINDOW_ATTENTION, (*operands, window, fact.causal), settings, like=like)


def _seen(editor: Editor, seen: Seen, like: fx.Node) -> fx.Node:
    """Booleans [B or 1, S]."""
    found = _by_position(editor, seen.vector, like)
    if seen.equals is not None:
        compare = aten.ne.Scalar if seen.negated else aten.eq.Scalar
        return editor.call(compare, (found, seen.equals), like=like)
    return editor.call(aten.logical_not.default, (found,), like=like) if seen.negated else found


def _by_position(editor: Editor, vector: Vector, like: fx.Node) -> fx.Node:
    """[B or 1, S], of a tensor with other dimensions around these."""
    found = editor.resolve(vector.node)
    for dim, place in reversed(list(enumerate(vector.places))):
        if isinstance(place, int):
            found = editor.call(aten.select.int, (found, dim, place), like=like)
    order = [place for place in vector.places if not isinstance(place, int)]
    if "sequence" not in order:
        return editor.call(aten.unsqueeze.default, (found, 0), like=like)
    return found if order[0] == "sequence" else editor.call(aten.transpose.int, (found, 0, 1), like=like)
