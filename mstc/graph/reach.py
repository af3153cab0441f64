"""What a node depends on, and what depends on it, within a set of nodes."""

from __future__ import annotations

from collections.abc import Iterable

import torch.fx as fx


def ancestors(nodes: Iterable[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """``nodes`` and everything in ``within`` that they depend on."""
    found: set[fx.Node] = set()
    stack = [n for n in nodes if n in within]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack.extend(i for i in node.all_input_nodes if i in within)
    return found


def descendants(nodes: Iterable[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """``nodes`` and everything in ``within`` that depends on them."""
    found: set[fx.Node] = set()
    stack = [n for n in nodes if n in within]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack.extend(u for u in node.users if u in within)
    return found
