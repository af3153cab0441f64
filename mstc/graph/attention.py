"""Attention as one op: PyTorch's, and that to the keys near each query, which the passes make of it."""

from __future__ import annotations

import torch
import torch.fx as fx

from mstc.ops.window_attention import EVERYTHING, WINDOW_ATTENTION, pairs

SDPA = torch.ops.aten.scaled_dot_product_attention.default
ATTENTION = (SDPA, WINDOW_ATTENTION)

__all__ = [
    "ATTENTION",
    "SDPA",
    "WINDOW_ATTENTION",
    "attention_in",
    "is_attention",
    "is_causal",
    "share_seen",
    "vectors_of",
    "window_of",
]


def is_attention(node: fx.Node) -> bool:
    return node.target in ATTENTION


def attention_in(graph: fx.Graph) -> list[fx.Node]:
    """All calls, in the order of the graph."""
    return [n for n in graph.nodes if n.op == "call_function" and is_attention(n)]


def window_of(node: fx.Node) -> int | None:
    """How near the keys are that a call attends to, None where it knows of no window."""
    if node.target is not WINDOW_ATTENTION:
        return None
    window = node.args[3]
    assert isinstance(window, int)
    return None if window == EVERYTHING else window


def vectors_of(node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """What tells a call the document of each token, and which keys are not hidden; None where nothing does."""
    documents, seen = (node.kwargs.get(name) for name in ("documents", "seen"))
    assert documents is None or isinstance(documents, fx.Node)
    assert seen is None or isinstance(seen, fx.Node)
    return documents, seen


def is_causal(node: fx.Node) -> bool:
    """Whether a call itself says that no query sees a later key."""
    if node.target is WINDOW_ATTENTION:
        return bool(node.args[4])
    return bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal"))


def share_seen(node: fx.Node, length: int) -> float:
    """Of all pairs of ``length`` queries and as many keys, how many are in a call's window; 1 without one."""
    window = window_of(node)
    return 1.0 if window is None else pairs(length, window, is_causal(node)) / max(length, 1) ** 2
