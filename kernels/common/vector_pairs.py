"""Products of rows under a decay per channel, without a positive exponent.

    A_ij = sum_k l_ik r_jk exp(L_ijk)   for j < i,   L_ij = g_{j+1} + .. + g_i      (exclusive: .. + g_{i-1})

exp(L_ij) splits into a factor of i and a factor of j only at a token between them. A chunk is
therefore halved again and again: for a block of 2 h tokens with middle m, every i in the second
half and j in the first has L_ij = (g_m + .. + g_i) + (g_{j+1} + .. + g_{m-1}), both sums at most
0 and both short. Each level is one product [h, K] [K, h] per block, log2(C) levels fill the
triangle, and each token takes part in each level once: C log2(C) / C exponentials per token
instead of C. (GLA, Yang et al. 2024, section 4.3 has two levels; this is its full recursion.)

The gradient of g follows level by level from sums over the same halves, and subtracts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["earlier_sum", "later_sum", "shifted", "vector_pairs", "vector_pairs_backward", "whole_sums"]

Lefts = Sequence[tuple[Tensor, bool]]
"""(rows [X, N, C, K], exclusive?)"""


def _halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """First and second halves of the blocks of 2 h tokens: views [X, N, M, h, K]."""
    blocks = x.view(*x.shape[:-2], -1, 2, h, x.shape[-1])
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _block(pairs: Tensor, h: int) -> Tensor:
    """The entries (second half, first half) of each block, a view [X, N, M, h, h] of [X, N, C, C]."""
    x, n, c, _ = pairs.shape
    m = c // (2 * h)
    corner = pairs.view(x, n, m, 2, h, m, 2, h)[:, :, :, 1, :, :, 0]
    return corner.diagonal(dim1=2, dim2=4).movedim(-1, 2)


def _merge(prefix: Tensor, suffix: Tensor, h: int) -> None:
    """From sums over blocks of h to sums over blocks of 2 h, in place."""
    total = prefix.view(*prefix.shape[:-2], -1, 2, h, prefix.shape[-1])[..., -1:, :].clone()
    _halves(prefix, h)[1].add_(total[..., 0, :, :])
    _halves(suffix, h)[0].add_(total[..., 1, :, :])


def shifted(x: Tensor) -> Tensor:
    """y_i = x_{i-1} along the tokens, y_1 = 0."""
    return torch.nn.functional.pad(x[..., :-1, :], (0, 0, 1, 0))


def _factors(lefts: Lefts, prefix: Tensor, suffix: Tensor, h: int) -> tuple[list[Tensor], Tensor]:
    """exp of the sums of each left in the second halves, and of the rights in the first."""
    sums = _halves(prefix, h)[1]
    inclusive = sums.exp()
    exclusive = shifted(sums).exp() if any(flag for _, flag in lefts) else inclusive
    return [exclusive if flag else inclusive for _, flag in lefts], _halves(suffix, h)[0].exp()


def vector_pairs(lefts: Lefts, rights: Sequence[Tensor], g: Tensor) -> tuple[list[list[Tensor]], tuple[Tensor, Tensor]]:
    """A [X, N, C, C] for each (left, right), zero on and above the diagonal; and ``whole_sums(g)``."""
    size = g.shape[-2]
    prefix, suffix = g.clone(), torch.zeros_like(g)
    pairs = [[g.new_zeros(*g.shape[:-1], size) for _ in rights] for _ in lefts]
    h = 1
    while h < size:
        left_factors, right_factor = _factors(lefts, prefix, suffix, h)
        later = [_halves(x, h)[1] * factor for (x, _), factor in zip(lefts, left_factors, strict=True)]
        earlier = [_halves(x, h)[0] * right_factor for x in rights]
        for row, left in zip(pairs, later, strict=True):
            for pair, right in zip(row, earlier, strict=True):
                _block(pair, h).copy_(left @ right.mT)
        _merge(prefix, suffix, h)
        h *= 2
    return pairs, (prefix, suffix)


def whole_sums(g: Tensor) -> tuple[Tensor, Tensor]:
    """(g_1 + .. + g_i, g_{i+1} + .. + g_C) for each token of a chunk."""
    return g.cumsum(-2), shifted(g.flip(-2).cumsum(-2)).flip(-2)


def later_sum(x: Tensor, exclusive: bool) -> Tensor:
    """y_t = sum of x_i over i >= t (exclusive: i > t), along the tokens."""
    size = x.shape[-2]
    return x.new_ones(size, size).triu(int(exclusive)) @ x


def earlier_sum(x: Tensor) -> Tensor:
    """y_t = sum of x_j over j < t, along the tokens."""
    size = x.shape[-2]
    return x.new_ones(size, size).tril(-1) @ x


def vector_pairs_backward(
    lefts: Lefts, rights: Sequence[Tensor], g: Tensor, grads: Sequence[Sequence[Tensor]]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The gradients of lefts, rights and g, for gradients [X, N, C, C] of each pair (read below the diagonal)."""
    size = g.shape[-2]
    prefix, suffix = g.clone(), torch.zeros_like(g)
    dlefts, drights = [torch.zeros_like(x) for x, _ in lefts], [torch.zeros_like(x) for x in rights]
    dg = torch.zeros_like(g)
    h = 1
    while h < size:
        left_factors, right_factor = _factors(lefts, prefix, suffix, h)
        later = [_halves(x, h)[1] * factor for (x, _), factor in zip(lefts, left_factors, strict=True)]
        earlier = [_halves(x, h)[0] * right_factor for x in rights]
        blocks = [[_block(grad, h) for grad in row] for row in grads]
        dfirst, dsecond = _halves(dg, h)
        for i, (_, exclusive) in enumerate(lefts):
            dlater = sum((blocks[i][j] @ right for j, right in enumerate(earlier)), start=later[i].new_zeros(()))
            _halves(dlefts[i], h)[1].addcmul_(dlater, left_factors[i])
            dsecond.add_(later_sum(dlater * later[i], exclusive))
        for j, right in enumerate(earlier):
            dearlier = sum((blocks[i][j].mT @ left for i, left in enumerate(later)), start=right.new_zeros(()))
            _halves(drights[j], h)[0].addcmul_(dearlier, right_factor)
            dfirst.add_(earlier_sum(dearlier * right))
        _merge(prefix, suffix, h)
        h *= 2
    return dlefts, drights, dg
