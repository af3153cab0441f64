"""Convolutions of single positions: matrix products with the channels in dimension 1."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten


def is_pointwise_convolution(node: fx.Node) -> bool:
    """Whether a position of the result reads that position only: kernels of length 1, no stride, no padding."""
    if node.target is not aten.convolution.default:
        return False
    args: Any = node.args
    x, weight, _, stride, padding, _, transposed, *_ = args
    kernel = weight.meta["val"].shape[2:]
    moves = [*((n, 1) for n in (*kernel, *stride)), *((n, 0) for n in padding)]
    same_rank = x.meta["val"].dim() == weight.meta["val"].dim()
    return same_rank and not transposed and all(isinstance(n, int) and n == still for n, still in moves)
