"""Linear attention with a scalar decay, a segment of chunks at a time, in plain torch.

In a chunk, with G_i = g_1 + .. + g_i, D_ij = exp(G_i - G_j) for j <= i, and S the state before it:

    A  = (q k^T) * D
    o  = scale * (A v + (exp(G) q) S)
    S' = exp(G_C) S + (exp(G_C - G) k)^T v

(RetNet eq. 7; SSD section 6; written out here again.) Backward, with do scaled by ``scale``, E the
gradient of S' and P = (do v^T) * A:

    dv = A^T do + (exp(G_C - G) k) E
    dq = ((do v^T) * D) k   + exp(G) (do S^T)
    dk = ((do v^T) * D)^T q + exp(G_C - G) (v E^T)
    dS = exp(G_C) E + (exp(G) q)^T do
    dg_t = sum_{j < t <= i} P_ij + sum_{i >= t} exp(G_i) q_i S do_i^T
         + sum_{j < t} exp(G_C - G_j) k_j E v_j^T + exp(G_C) <E, S>

The last line adds up what depends on g_t and subtracts nothing (see ``segment_gradient``).
"""

from __future__ import annotations

from torch import Tensor

from mstc.kernels.common.gates import (
    chunk_decays,
    pair_decays,
    prefix_sum,
    running_sum,
    scan_states,
    segment_gradient,
    suffix_sum,
)
from mstc.kernels.common.segments import Body, Tokens

__all__ = ["BODY"]


def forward(tokens: Tokens, shared: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """tokens: q (already scaled), k, v, decay or None."""
    q, k, v, g = tokens
    if g is None:
        before, after = scan_states(None, k.mT @ v, state)
        scores, q_state = (q @ k.mT).tril(), q
    else:
        total = running_sum(g)
        from_start, to_end, last = chunk_decays(total, q.dtype)
        before, after = scan_states(last, (k * to_end.unsqueeze(-1)).mT @ v, state)
        scores, q_state = pair_decays(total, q.dtype).mul_(q @ k.mT), q * from_start.unsqueeze(-1)
    return (scores @ v).add_(q_state @ before), after


def backward(
    tokens: Tokens, shared: Tokens, state: Tensor, do: Tensor, grad_state: Tensor
) -> tuple[Tokens, Tokens, Tensor]:
    """See the module's docstring."""
    q, k, v, g = tokens
    if g is None:
        return _backward_plain(q, k, v, state, do, grad_state)
    total = running_sum(g)
    from_start, to_end, last = chunk_decays(total, q.dtype)
    q_start, k_end = q * from_start.unsqueeze(-1), k * to_end.unsqueeze(-1)
    before, _ = scan_states(last, k_end.mT @ v, state)
    after, initial = scan_states(last, q_start.mT @ do, grad_state, reverse=True)
    pairs = pair_decays(total, q.dtype)
    products = q @ k.mT
    dscores = (do @ v.mT).mul_(pairs)
    dq_state = (do @ before.mT).mul_(from_start.unsqueeze(-1))
    dk_state = (v @ after.mT).mul_(to_end.unsqueeze(-1))
    dg = segment_gradient(dscores * products) + suffix_sum((q * dq_state).sum(-1))
    dg = dg + prefix_sum((k * dk_state).sum(-1))
    dg = dg + (last.to(q.dtype).exp() * (after * before).sum((-1, -2))).unsqueeze(-1)
    dv = (pairs.mul_(products).mT @ do).add_(k_end @ after)
    return (dq_state.add_(dscores @ k), dk_state.add_(dscores.mT @ q), dv, dg), (), initial


def _backward_plain(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, do: Tensor, grad_state: Tensor
) -> tuple[Tokens, Tokens, Tensor]:
    """The same with g = 0."""
    before, _ = scan_states(None, k.mT @ v, state)
    after, initial = scan_states(None, q.mT @ do, grad_state, reverse=True)
    dscores = (do @ v.mT).tril()
    dq = dscores @ k + do @ before.mT
    dk = dscores.mT @ q + v @ after.mT
    dv = (q @ k.mT).tril().mT @ do + k @ after
    return (dq, dk, dv, None), (), initial


BODY = Body(forward, backward)
