"""Which memory a value lies in: its own, or that of what it views."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

aten = torch.ops.aten


def is_view(node: object) -> bool:
    """Whether the node's result lies in the memory of its first argument."""
    target = getattr(node, "target", None)
    if isinstance(node, fx.Node) and target is operator.getitem:
        return is_view(node.args[0])
    schema = getattr(target, "_schema", None)
    if target is aten._unsafe_view.default:  # a view that autograd knows nothing of
        return True
    return schema is not None and any(r.alias_info is not None for r in schema.returns)


def root_of(node: fx.Node) -> fx.Node:
    """The node whose memory this value lies in."""
    while node.op == "call_function" and is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
