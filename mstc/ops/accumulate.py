"""Sums over chunks: gradients of shared inputs, kept in float32 where their own precision is lower."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mstc.ops import products
from mstc.ops.joint import Backward
from mstc.ops.pieces import empty
from mstc.ops.program import Program


class Accumulators:
    """Gradients of the shared inputs of a loop, added up chunk by chunk."""

    def __init__(self, program: Program, backward: Backward) -> None:
        self._program = program
        self._backward = backward
        self._sums: dict[int, torch.Tensor] = {}

    def add(self, results: Sequence[torch.Tensor]) -> None:
        """Add what one chunk's backward body returned."""
        for factor in self._backward.factors:
            self._add_product(factor.shared, results[factor.x], results[factor.dy], factor.transposed)
        for shared, position in self._backward.shared_grads.items():
            self._add(shared, results[position])

    def _add_product(self, shared: int, x: torch.Tensor, dy: torch.Tensor, transposed: bool) -> None:
        """W += dy^T x (or x^T dy), rows flattened."""
        dtype = self._program.accumulator_dtype(self._program.shared[shared].dtype)
        x, dy = (factor.reshape(factor.shape[:-1].numel(), factor.shape[-1]) for factor in (x, dy))
        left, right = (x.t(), dy) if transposed else (dy.t(), x)
        if _multiplied_as_they_are(left, right, dtype):
            if shared in self._sums:
                torch.addmm(self._sums[shared], left, right, out_dtype=dtype, out=self._sums[shared])
            else:
                torch.mm(left, right, out_dtype=dtype, out=self._empty(shared))
        elif shared in self._sums:
            total = self._sums[shared]
            products.addmm(total, left.to(dtype), right.to(dtype), out=total)
        else:
            products.mm(left.to(dtype), right.to(dtype), out=self._empty(shared))

    def _add(self, shared: int, gradient: torch.Tensor) -> None:
        if shared in self._sums:
            self._sums[shared].add_(gradient)
        else:
            self._empty(shared).copy_(gradient)

    def _empty(self, shared: int) -> torch.Tensor:
        """A new accumulator, laid out as the input is: autograd takes such a gradient as it is, any other it copies."""
        value = self._program.shared[shared]
        dtype = self._program.accumulator_dtype(value.dtype)
        self._sums[shared] = empty(value.shape, value.order, dtype, value.device)
        return self._sums[shared]

    def result(self, shared: int) -> torch.Tensor:
        """The whole gradient in the input's own dtype; zeros where nothing was added."""
        value = self._program.shared[shared]
        found = self._sums.pop(shared, None)
        if found is None:
            return empty(value.shape, value.order, value.dtype, value.device).zero_()
        return found.to(value.dtype)


def _multiplied_as_they_are(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether a GPU multiplies factors in half precision on its tensor cores and adds up in float32.

    Casts to float32 would take it to slower units. PyTorch has such products on CUDA only.
    """
    halves = left.dtype is right.dtype and left.dtype in (torch.bfloat16, torch.float16)
    return halves and dtype is torch.float32 and left.is_cuda and torch.version.hip is None
