"""A copy of a graph: for a draft that is edited and thrown away, and for pictures of before and after."""

from __future__ import annotations

import torch.fx as fx


def copy_of(gm: fx.GraphModule) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """The copy, which reads the same constants, and the copy of each node."""
    graph = fx.Graph()
    twins: dict[fx.Node, fx.Node] = {}
    node = graph.output(graph.graph_copy(gm.graph, twins))
    node.meta = dict(gm.graph.output_node().meta)
    return fx.GraphModule(gm, graph), twins
