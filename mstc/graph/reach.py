"""What a node depends on, and what depends on it, within a set of nodes or (None) the whole graph."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

import torch.fx as fx


def ancestors(nodes: Iterable[fx.Node], within: Container[fx.Node] | None = None) -> set[fx.Node]:
    """``nodes`` and everything in ``within`` that they depend on."""
    return _reached(nodes, within, lambda n: n.all_input_nodes)


def descendants(nodes: Iterable[fx.Node], within: Container[fx.Node] | None = None) -> set[fx.Node]:
    """``nodes`` and everything in ``within`` that depends on them."""
    return _reached(nodes, within, lambda n: n.users)


def _reached(
    nodes: Iterable[fx.Node], within: Container[fx.Node] | None, neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and (within is None or node in within):
            found.add(node)
            stack.extend(neighbours(node))
    return found
