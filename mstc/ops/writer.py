"""Calls added to a traced body."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from mstc.graph.editor import add_call

prims = torch.ops.prims


class Writer:
    """Adds calls before a node of a body, which needs no provenance: nobody but a compiler reads it."""

    def __init__(self, before: fx.Node) -> None:
        self._before = before

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return add_call(target, args, kwargs, self._before, self._before.meta["val"].fake_mode)

    def cast(self, x: fx.Node, dtype: torch.dtype) -> fx.Node:
        """x, converted if it is of another dtype."""
        return x if x.meta["val"].dtype == dtype else self(prims.convert_element_type.default, x, dtype)
