"""What a graph returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch.fx as fx


def returned_by(graph: fx.Graph) -> list[Any]:
    """The values that a graph returns, in order: nodes, constants, or tuples of them where it returns such."""
    results = graph.output_node().args[0]
    return list(cast("Sequence[Any]", results)) if isinstance(results, Sequence) else [results]
