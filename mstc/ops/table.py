"""``mstc::table_gradient``: the gradient of a table of embeddings on a CPU.

    dtable[r, h] = sum over all i with index[i] = r of grad[i, h]

Where a bias of attention is read from a small table (relative positions), all pairs of tokens add to a few rows. As
code of Inductor's that is an atomic addition for each pair and head; ``index_add`` adds a row at a time, and takes a
fifth of that (a third to a half of ATen's own kernel for embeddings).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten

# Of a gradient that must be copied to be scattered.
PIECES = 16

torch.library.define("mstc::table_gradient", "(Tensor grad, Tensor index, SymInt rows) -> Tensor")


@torch.library.impl("mstc::table_gradient", "CPU")
def _table_gradient(grad: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    """Scattered in pieces where it does not lie in order (a bias of all pairs does not): only a piece is copied."""
    width = grad.shape[-1]
    total = grad.new_zeros((rows, width))
    pieces = [(index, grad)]
    if index.dim() and not grad.is_contiguous():
        longest = max(range(index.dim()), key=index.size)
        pieces = list(zip(index.chunk(PIECES, longest), grad.chunk(PIECES, longest), strict=True))
    for i, g in pieces:
        total.index_add_(0, i.reshape(-1), g.reshape(i.numel(), width))
    return total


def _table_gradient_fake(grad: torch.Tensor, index: torch.Tensor, rows: int) -> torch.Tensor:
    return grad.new_empty((rows, grad.shape[-1]))


torch.library.register_fake("mstc::table_gradient", _table_gradient_fake)


def use_table_gradient(graph: fx.Graph) -> None:
    """Let the gradients of tables in a backward body be computed by the op, where they lie on a CPU."""
    for node in graph.find_nodes(op="call_function", target=aten.embedding_dense_backward.default):
        args: Any = node.args
        grad, index, rows, padding, by_frequency = args
        if node.meta["val"].device.type == "cpu" and padding < 0 and not by_frequency:
            node.target = torch.ops.mstc.table_gradient.default
            node.args = (grad, index, rows)
