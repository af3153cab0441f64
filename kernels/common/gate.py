"""One face for both kinds of decay, for the classes whose algebra does not depend on the kind.

A gate is made from the log decays of a segment, g None, [X, N, C] or [X, N, C, K]. It gives the
decayed products A_ij = sum_k l_ik r_jk exp(L_ijk), j < i, their gradients, and the decays between
a token and its chunk's ends:

    from_start  exp(g_1 + .. + g_i)        to_end  exp(g_{i+1} + .. + g_C)        last  exp(g_1 + .. + g_C)

``exclusive`` marks a left that sees the state before its own token's decay.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mstc.kernels.common.gates import chunk_decays, pair_decays, running_sum, segment_gradient
from mstc.kernels.common.vector_pairs import (
    Lefts,
    earlier_sum,
    later_sum,
    shifted,
    vector_pairs,
    vector_pairs_backward,
    whole_sums,
)

__all__ = ["Gate", "VectorGate", "make_gate"]

Pairs = list[list[Tensor]]


class Gate:
    """A scalar decay g [X, N, C]; inclusive lefts only."""

    def __init__(self, g: Tensor, dtype: torch.dtype) -> None:
        total = running_sum(g)
        from_start, to_end, last = chunk_decays(total, dtype)
        self.decays = pair_decays(total, dtype).tril_(-1)
        self.from_start, self.to_end = from_start.unsqueeze(-1), to_end.unsqueeze(-1)
        self.last = last.to(dtype).exp().unsqueeze(-1)

    def pairs(self, lefts: Lefts, rights: Sequence[Tensor]) -> Pairs:
        """A for each (left, right)."""
        return [[(left @ right.mT).mul_(self.decays) for right in rights] for left, _ in lefts]

    def pairs_backward(
        self, lefts: Lefts, rights: Sequence[Tensor], pairs: Pairs, grads: Pairs
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The gradients of lefts, rights and g, from those of ``pairs``."""
        p = sum((a * d for x, y in zip(pairs, grads, strict=True) for a, d in zip(x, y, strict=True)), start=0.0)
        decayed = [[grad * self.decays for grad in row] for row in grads]
        dlefts = [add([d @ right for d, right in zip(row, rights, strict=True)]) for row in decayed]
        columns = [[row[j] for row in decayed] for j in range(len(rights))]
        drights = [add([d.mT @ x for d, (x, _) in zip(column, lefts, strict=True)]) for column in columns]
        assert isinstance(p, Tensor)
        return dlefts, drights, segment_gradient(p)

    def ends_backward(self, dstart: Sequence[tuple[Tensor, bool]], dend: Sequence[Tensor], dlast: Tensor) -> Tensor:
        """The gradient of g through the ends: of from_start, to_end, last, each times its value [.., C or none, K]."""
        dg = dlast.sum(-1, keepdim=True).unsqueeze(-2)
        dg = dg + later_sum(add([d.sum(-1, keepdim=True) for d, _ in dstart]), False)
        dg = dg + earlier_sum(add([d.sum(-1, keepdim=True) for d in dend]))
        return dg.squeeze(-1)


class VectorGate(Gate):
    """A decay per channel g [X, N, C, K]."""

    def __init__(self, g: Tensor) -> None:
        self.g = g
        prefix, suffix = whole_sums(g)
        self.from_start, self.to_end = prefix.exp(), suffix.exp()
        self.before_start = shifted(prefix).exp()
        self.last = prefix[..., -1, :].exp()

    def pairs(self, lefts: Lefts, rights: Sequence[Tensor]) -> Pairs:
        return vector_pairs(lefts, rights, self.g)[0]

    def pairs_backward(
        self, lefts: Lefts, rights: Sequence[Tensor], pairs: Pairs, grads: Pairs
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        return vector_pairs_backward(lefts, rights, self.g, grads)

    def ends_backward(self, dstart: Sequence[tuple[Tensor, bool]], dend: Sequence[Tensor], dlast: Tensor) -> Tensor:
        later = add([later_sum(d, exclusive) for d, exclusive in dstart])
        return later + earlier_sum(add(list(dend))) + dlast.unsqueeze(-2)


def add(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of one or more tensors."""
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def make_gate(g: Tensor | None, like: Tensor) -> Gate:
    """The gate of a segment; ``like`` [X, N, C, K] gives shape and dtype where g is None."""
    if g is None:
        return Gate(like.new_zeros(like.shape[:-1]), like.dtype)
    return VectorGate(g) if g.dim() == like.dim() else Gate(g, like.dtype)
