"""The delta rule with a decay, a segment of chunks at a time, in plain torch.

In a chunk write u_i = beta_i (v_i - k_i diag(exp(g_i)) S_{i-1}), the value that token i really adds.
With the decayed products A of a gate (``common/gate.py``), a = exp(g_1 + .. + g_i), e = exp(g_{i+1} + ..
+ g_C), and S the state before the chunk:

    (I + beta A_kk) U = beta (V - (a k) S)          U = X beta V - X beta (a k) S = Y - W S
    o  = A_qk U + (a q) S                           X = (I + beta A_kk)^-1
    S' = diag(a_C) S + (e k)^T U = M S + (e k)^T Y   M = diag(a_C) - (e k)^T W

(The UT transform of DeltaNet, Yang et al. 2024, section 3.2, with the decay inside.) Backward, E the
gradient of S':

    dU = A_qk^T do + (e k) E        dS = M^T E + (a q)^T do - W^T A_qk^T do
    dR = X^T dU   (R the right side above)          d(beta A_kk) = -dR U^T
    dV = beta dR   d(a k) = -beta dR S^T   d(a q) = do S^T   d(e k) = U E^T   dA_qk = do U^T
    dbeta_i = sum_j d(beta A_kk)_ij A_kk,ij + dR_i (v_i - (a k)_i S)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstc.kernels.common.gate import Gate, make_gate
from mstc.kernels.common.segments import Body, Tokens
from mstc.kernels.common.triangular import inverse_unit_lower, scan_matrices

__all__ = ["BODY"]


def _transition(gate: Gate, k_end: Tensor, w: Tensor) -> Tensor:
    """M = diag(a_C) - (e k)^T W, [X, N, K, K]."""
    key = k_end.shape[-1]
    diagonal = torch.diag_embed(gate.last.expand(*gate.last.shape[:-1], key))
    return diagonal - k_end.mT @ w


def forward(tokens: Tokens, shared: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """tokens: q (already scaled), k, v, g or None, beta."""
    q, k, v, g, beta = tokens
    beta = beta.unsqueeze(-1)
    gate = make_gate(g, k)
    (a_qk,), (a_kk,) = gate.pairs([(q, False), (k, False)], [k])
    inverse = inverse_unit_lower(beta * a_kk)
    w, y = inverse @ (beta * gate.from_start * k), inverse @ (beta * v)
    k_end = gate.to_end * k
    states = scan_matrices(_transition(gate, k_end, w), k_end.mT @ y, state)
    before = torch.stack(states[:-1], 1)
    u = y - w @ before
    out = a_qk @ u + (gate.from_start * q) @ before + (q * k).sum(-1, keepdim=True) * u
    return out, states[-1]


def backward(
    tokens: Tokens, shared: Tokens, state: Tensor, do: Tensor, grad_state: Tensor
) -> tuple[Tokens, Tokens, Tensor]:
    """See the module's docstring."""
    q, k, v, g, beta = tokens
    beta = beta.unsqueeze(-1)
    gate = make_gate(g, k)
    lefts = [(q, False), (k, False)]
    pairs = gate.pairs(lefts, [k])
    (a_qk,), (a_kk,) = pairs
    inverse = inverse_unit_lower(beta * a_kk)
    k_start, q_start, k_end = gate.from_start * k, gate.from_start * q, gate.to_end * k
    w, y = inverse @ (beta * k_start), inverse @ (beta * v)
    matrix = _transition(gate, k_end, w)
    before = torch.stack(scan_matrices(matrix, k_end.mT @ y, state)[:-1], 1)
    u = y - w @ before
    weight = (q * k).sum(-1, keepdim=True)
    du_local = a_qk.mT @ do + weight * do
    added = q_start.mT @ do - w.mT @ du_local
    grads = scan_matrices(matrix.mT.flip(1), added.flip(1), grad_state)
    after = torch.stack(grads[-2::-1], 1)
    dr = inverse.mT @ (du_local + k_end @ after)
    da_kk = -(dr @ u.mT)
    dbeta = (da_kk * a_kk).sum(-1) + (dr * (v - k_start @ before)).sum(-1)
    dv = beta * dr
    dq_start, dk_start, dk_end = do @ before.mT, -(dv @ before.mT), u @ after.mT
    (dq, dk), (dk_right,), dg = gate.pairs_backward(lefts, [k], pairs, [[do @ u.mT], [beta * da_kk]])
    dweight = (do * u).sum(-1, keepdim=True)
    dq = dq + gate.from_start * dq_start + dweight * k
    dk = dk + dk_right + gate.from_start * dk_start + gate.to_end * dk_end + dweight * q
    dstart = [(dq_start * q_start + dk_start * k_start, False)]
    dg = dg + gate.ends_backward(dstart, [dk_end * k_end], gate.last * (after * before).sum(-1))
    return (dq, dk, dv, None if g is None else dg, dbeta), (), grads[-1]


BODY = Body(forward, backward)
