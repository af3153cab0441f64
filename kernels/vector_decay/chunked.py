"""Linear attention with a decay per channel, a segment of chunks at a time, in plain torch.

In a chunk, with P_i = g_1 + .. + g_i, R_i = g_{i+1} + .. + g_C, and S the state before it:

    A  = vector_pairs(q, k), with q_i . k_i on the diagonal
    o  = A v + (exp(P) q) S
    S' = diag(exp(P_C)) S + (exp(R) k)^T v

With a bonus u, q_i reads S_{i-1}: P_{i-1} for P_i, and q_i . (u k_i) on the diagonal. Backward, E
the gradient of S':

    dA = do v^T                     dv = A^T do + (exp(R) k) E
    dq = from A + exp(P) (do S^T)   dk = from A + exp(R) (v E^T)
    dS = diag(exp(P_C)) E + (exp(P) q)^T do
    dg = from A + sums over later tokens of q dq, over earlier ones of k dk (the state's parts only)
         + exp(P_C) rowsum(E S)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstc.kernels.common.segments import Body, Tokens
from mstc.kernels.common.vector_pairs import (
    earlier_sum,
    later_sum,
    shifted,
    vector_pairs,
    vector_pairs_backward,
    whole_sums,
)

__all__ = ["BODY"]


def _scan(decay: Tensor, added: Tensor, initial: Tensor) -> list[Tensor]:
    """S_0 .. S_N with S_n = decay_n S_{n-1} + B_n; decay [X, N, K], added [X, N, K, V]."""
    states = [initial]
    for n in range(added.shape[1]):
        states.append(torch.addcmul(added[:, n], decay[:, n].unsqueeze(-1), states[-1]))
    return states


def _self_weight(q: Tensor, k: Tensor, u: Tensor | None) -> Tensor:
    """What the diagonal of A holds, [X, N, C, 1]."""
    weighted = k if u is None else k * u[:, None, None]
    return (q * weighted).sum(-1, keepdim=True)


def forward(tokens: Tokens, shared: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """tokens: q (already scaled), k, v, g; shared: u or None."""
    q, k, v, g = tokens
    (u,) = shared
    ((pairs,),), (prefix, suffix) = vector_pairs([(q, u is not None)], [k], g)
    states = _scan(prefix[..., -1, :].exp(), (k * suffix.exp()).mT @ v, state)
    read = prefix if u is None else shifted(prefix)
    out = (pairs @ v).add_((q * read.exp()) @ torch.stack(states[:-1], 1))
    return out.addcmul_(_self_weight(q, k, u), v), states[-1]


def backward(
    tokens: Tokens, shared: Tokens, state: Tensor, do: Tensor, grad_state: Tensor
) -> tuple[Tokens, Tokens, Tensor]:
    """See the module's docstring."""
    q, k, v, g = tokens
    (u,) = shared
    exclusive = u is not None
    prefix, suffix = whole_sums(g)
    ((pairs,),), _ = vector_pairs([(q, exclusive)], [k], g)
    last = prefix[..., -1, :].exp()
    from_start, to_end = (shifted(prefix) if exclusive else prefix).exp(), suffix.exp()
    k_end = k * to_end
    before = torch.stack(_scan(last, k_end.mT @ v, state)[:-1], 1)
    grads = _scan(last.flip(1), ((q * from_start).mT @ do).flip(1), grad_state)
    after = torch.stack(grads[-2::-1], 1)
    dpairs = do @ v.mT
    (dq,), (dk,), dg = vector_pairs_backward([(q, exclusive)], [k], g, [[dpairs]])
    dq_state, dk_state = (do @ before.mT).mul_(from_start), (v @ after.mT).mul_(to_end)
    dg += later_sum(q * dq_state, exclusive)
    dg += earlier_sum(k * dk_state)
    dg += (last * (after * before).sum(-1)).unsqueeze(-2)
    weight, dweight = _self_weight(q, k, u), (do * v).sum(-1, keepdim=True)
    dv = (pairs.mT @ do).add_(k_end @ after).addcmul_(weight, do)
    dq.add_(dq_state)
    dk.add_(dk_state)
    if u is None:
        dq.addcmul_(dweight, k)
        dk.addcmul_(dweight, q)
        return (dq, dk, dv, dg), (None,), grads[-1]
    both = dweight * u[:, None, None]
    du = (dweight * q * k).sum((1, 2))
    return (dq.addcmul_(both, k), dk.addcmul_(both, q), dv, dg), (du,), grads[-1]


BODY = Body(forward, backward)
