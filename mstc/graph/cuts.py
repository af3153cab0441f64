"""The narrowest place to cut a stretch of nodes: a minimum cut in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import networkx as nx
import torch
import torch.fx as fx

from mstc.graph.reach import ancestors, descendants


def narrowest(
    within: set[fx.Node],
    fixed: set[fx.Node],
    sinks: Sequence[fx.Node],
    free: set[fx.Node],
    weight: Callable[[fx.Node], float],
    with_readers: bool = False,
) -> set[fx.Node]:
    """The nodes of ``within`` on the sinks' side of a minimum cut.

    fixed: may not be on that side (their values, or values after them, are cut); free: values
    that cost nothing to cut; inputs from outside ``within`` cost nothing either; with_readers: what is on
    that side takes all of its readers in ``within`` along.
    """
    graph = nx.DiGraph()
    for node in within:
        multiple = not isinstance(node.meta.get("val"), torch.Tensor)
        capacity = 0.0 if node in free else math.inf if multiple else weight(node)
        _edge(graph, (node, 0), (node, 1), capacity)
        for i in node.all_input_nodes:
            if i in within:
                _edge(graph, (i, 1), (node, 0), math.inf)
                if with_readers:
                    _edge(graph, (node, 0), (i, 0), math.inf)
        if node in fixed:
            _edge(graph, "source", (node, 0), math.inf)
    for sink in sinks:
        _edge(graph, (sink, 0), "sink", math.inf)
    if "source" not in graph or "sink" not in graph:
        return ancestors(sinks, within)
    # Of several minimum cuts networkx gives the one nearest to the target; so the source is made that.
    _, (_, near) = nx.minimum_cut(graph.reverse(copy=True), "sink", "source")
    beyond = {n for n in within if (n, 0) not in near}
    return _with_readers(sinks, beyond) if with_readers else ancestors(sinks, beyond)


def _with_readers(sinks: Sequence[fx.Node], beyond: set[fx.Node]) -> set[fx.Node]:
    """What leads to the sinks, what else is made of it, and what that reads."""
    found: set[fx.Node] = set()
    more = ancestors(sinks, beyond)
    while more != found:
        found, more = more, ancestors(descendants(more, beyond), beyond)
    return found


def _edge(graph: nx.DiGraph, a: object, b: object, capacity: float) -> None:
    if math.isinf(capacity):
        graph.add_edge(a, b)  # networkx reads a missing capacity as unbounded
    else:
        graph.add_edge(a, b, capacity=capacity)
