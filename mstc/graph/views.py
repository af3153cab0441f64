"""Which memory a value lies in: its own, or that of what it views; and views that any strides allow."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator

import torch
import torch.fx as fx

aten = torch.ops.aten

_RESHAPES = (aten.view.default, aten._unsafe_view.default)


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


@contextlib.contextmanager
def any_strides(gm: fx.GraphModule) -> Iterator[None]:
    """Inside, a view of the graph asks for a shape only, as what it came from did.

    The graph was traced with PyTorch's strides; Inductor's decompositions make some others (of ``cat``, where all
    operands but one are empty), and a view that they do not allow raises.
    """
    views = [n for target in _RESHAPES for n in gm.graph.find_nodes(op="call_function", target=target)]
    targets = [n.target for n in views]
    for node in views:
        node.target = aten.reshape.default
    gm.recompile()
    try:
        yield
    finally:
        for node, target in zip(views, targets, strict=True):
            node.target = target
        gm.recompile()
