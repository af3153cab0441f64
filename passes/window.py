"""Attention to a window of keys: what the call takes, and the call; for the passes that prove a window."""

from __future__ import annotations

import torch.fx as fx

from mstc.graph.attention import WINDOW_ATTENTION
from mstc.graph.editor import Editor
from mstc.graph.predicates.call import shape_of
from mstc.graph.predicates.facts import MaskFact


def window_obstacle(query: fx.Node, key: fx.Node, value: fx.Node, dropout: object) -> str:
    """Why ``mstc::window_attention`` does not take these operands, "" if it does."""
    q, k, v = (shape_of(n) for n in (query, key, value))
    if dropout:
        return "dropout needs all pairs"
    if not len(q) == len(k) == len(v) == 4:
        return "the operands have other dimensions than batch, heads, tokens and features"
    if q[2] != k[2]:
        return "there are not provably as many queries as keys"
    if q[0] != k[0] or q[3] != k[3] or k[:3] != v[:3] or q[1] % k[1] != 0:
        return "the operands differ in batch, heads or features"
    return ""


def window_call(
    editor: Editor, query: fx.Node, key: fx.Node, value: fx.Node, fact: MaskFact, scale: object, like: fx.Node
) -> fx.Node:
    """The call for a mask that is a window and nothing else; scale: a number, or None for the usual one."""
    assert fact.window is not None
    return editor.call(WINDOW_ATTENTION, (query, key, value, fact.window, fact.causal), {"scale": scale}, like=like)
