"""Joining parts of one softmax by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge"]


def merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """(o, lse) of the union of two disjoint sets of keys; o [..., V], lse [...]. Differentiable.

    lse = log(exp(lse1) + exp(lse2)),  o = exp(lse1 - lse) o1 + exp(lse2 - lse) o2

    A part that sees no key has lse = -inf. The linear part of a hybrid joins by the log of its
    normalizer (``feature_maps.normalized_attention``).
    """
    lse = torch.logaddexp(lse1, lse2)
    safe = torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)
    first, second = (lse1 - safe).exp().unsqueeze(-1), (lse2 - safe).exp().unsqueeze(-1)
    return (first * o1 + second * o2).to(o1.dtype), lse
