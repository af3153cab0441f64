"""Attention without a mask, as a fused op says it: the call, and what its form for a window takes."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from mstc.graph.attention import SDPA, WINDOW_ATTENTION
from mstc.graph.editor import Editor
from mstc.graph.predicates.call import Call, shape_of
from mstc.graph.predicates.facts import MaskFact


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
    """Attention of (q, k, v) to the pairs of a mask that is causal, a window or nothing.

    keywords: ``scale`` and ``enable_gqa`` of ``scaled_dot_product_attention``, where they are given.
    """
    if fact.window is not None:
        scale = {"scale": keywords.get("scale")}
        return editor.call(WINDOW_ATTENTION, (*operands, fact.window, fact.causal), scale, like=like)
    return editor.call(SDPA, (*operands, None, dropout, fact.causal), keywords, like=like)
