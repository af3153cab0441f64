"""Calls added to a traced body."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

prims = torch.ops.prims


class Writer:
    """Adds calls before a node; each new node knows its value's shape."""

    def __init__(self, graph: fx.Graph, before: fx.Node) -> None:
        self._graph, self._before = graph, before

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, args, kwargs)
        with self._before.meta["val"].fake_mode, torch.no_grad():
            node.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        return node

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """x, converted if it is of another dtype."""
        return x if x.meta["val"].dtype == dtype else self(prims.convert_element_type.default, x, dtype)
