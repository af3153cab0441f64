"""Sliding-window attention a block of queries at a time, in plain torch.

A block sees at most window + BLOCK - 1 keys and the sinks; what is held beyond inputs and outputs is
one block's scores. The backward computes the probabilities P again from the log-sum-exp l:

    dS = P * (do v^T - rowsum(do * o) + dl)      dq = scale dS k      dk = scale dS^T q      dv = P^T do

(dl, the gradient of l, is what merging with another part of a softmax sends back.)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mstc.kernels.common.checks import check_offsets
from mstc.kernels.common.segments import state_dtype
from mstc.kernels.sliding_window.reference import visible

__all__ = ["BLOCK", "run_backward", "run_forward"]

BLOCK = 128


def _blocks(
    batch: int, tokens: int, cu_seqlens: Tensor | None, window: int, sinks: int, device: torch.device
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """(row, queries, indices of the keys that some query sees, which query sees which)."""
    offsets = [0, tokens] if cu_seqlens is None else check_offsets(cu_seqlens, tokens)
    for row in range(batch):
        for start, stop in pairwise(offsets):
            for first in range(start, stop, BLOCK):
                last = min(first + BLOCK, stop)
                low = max(start, first - window + 1)
                head = torch.arange(start, min(start + sinks, low), device=device)
                keys = torch.cat([head, torch.arange(low, last, device=device)])
                queries = torch.arange(first, last, device=device)
                yield row, slice(first, last), keys, visible(queries - start, keys - start, window, sinks)


def _heads_first(tensor: Tensor, row: int, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, H, W] -> [H, tokens, W]."""
    return tensor[row, index].to(dtype).transpose(0, 1)


def run_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V], log-sum-exp [B, T, H])."""
    batch, tokens, heads, _ = q.shape
    dtype = state_dtype(q.dtype)
    out, lse = v.new_empty(v.shape), q.new_empty((batch, tokens, heads), dtype=dtype)
    for row, queries, keys, mask in _blocks(batch, tokens, cu_seqlens, window, sinks, q.device):
        scores = _heads_first(q, row, queries, dtype).mul(scale) @ _heads_first(k, row, keys, dtype).mT
        scores.masked_fill_(~mask, -torch.inf)
        total = scores.logsumexp(-1)
        probabilities = scores.sub_(total.unsqueeze(-1)).exp_()
        out[row, queries] = (probabilities @ _heads_first(v, row, keys, dtype)).transpose(0, 1).to(v.dtype)
        lse[row, queries] = total.mT
    return out, lse


def run_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    window: int,
    sinks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); keys' gradients are summed in float32."""
    batch, tokens, _, _ = q.shape
    dtype = lse.dtype
    dq = q.new_empty(q.shape)
    dk, dv = k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    for row, queries, keys, mask in _blocks(batch, tokens, cu_seqlens, window, sinks, q.device):
        b_q, b_do = _heads_first(q, row, queries, dtype).mul(scale), _heads_first(grad_out, row, queries, dtype)
        b_k, b_v = _heads_first(k, row, keys, dtype), _heads_first(v, row, keys, dtype)
        scores = (b_q @ b_k.mT).masked_fill_(~mask, -torch.inf)
        probabilities = scores.sub_(lse[row, queries].mT.unsqueeze(-1)).exp_()
        shift = -(b_do * _heads_first(out, row, queries, dtype)).sum(-1, keepdim=True)
        if grad_lse is not None:
            shift += grad_lse[row, queries].mT.unsqueeze(-1)
        dscores = (b_do @ b_v.mT).add_(shift).mul_(probabilities)
        dq[row, queries] = (dscores @ b_k).mul_(scale).transpose(0, 1).to(q.dtype)
        dk[row].index_add_(0, keys, (dscores.mT @ b_q).transpose(0, 1))
        dv[row].index_add_(0, keys, (probabilities.mT @ b_do).transpose(0, 1))
    return dq, dk.to(k.dtype), dv.to(v.dtype)
