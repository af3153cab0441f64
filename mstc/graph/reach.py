"""What a node depends on, and what depends on it, within a set of nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.fx as fx


def ancestors(nodes: Iterable[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """``nodes`` and everything in ``within`` that they depend on."""
    return _reached(nodes, within, lambda n: n.all_input_nodes)


def descendants(nodes: Iterable[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """``nodes`` and everything in ``within`` that depends on them."""
    return _reached(nodes, within, lambda n: n.users)


def _reached(
    nodes: Iterable[fx.Node], within: set[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = [n for n in nodes if n in within]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found.add(node)
        stack.extend(n for n in neighbours(node) if n in within)
    return found
