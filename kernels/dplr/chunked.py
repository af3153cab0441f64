"""A diagonal plus rank one transition, a segment of chunks at a time, in plain torch.

In a chunk write u_i = a_i S_{i-1}, what token i reads. With the decayed products A of a gate
(``common/gate.py``; exclusive for a, which reads before the decay), p = exp(g_1 + .. + g_i), p' = exp(g_1 +
.. + g_{i-1}), e = exp(g_{i+1} + .. + g_C), and S the state before the chunk:

    (I - A_ab) U = A_ak V + (p' a) S          U = X A_ak V + X (p' a) S = Y + W S,   X = (I - A_ab)^-1
    o  = A_qk V + A_qb U + (p q) S
    S' = diag(p_C) S + (e k)^T V + (e b)^T U = M S + (e k)^T V + (e b)^T Y,   M = diag(p_C) + (e b)^T W

Backward, E the gradient of S', Z the right side of the first line:

    dU = A_qb^T do + (e b) E        dS = M^T E + (p q)^T do + W^T A_qb^T do
    dZ = X^T dU      dA_ab = dZ U^T      dA_ak = dZ V^T      d(p' a) = dZ S^T
    dV = A_qk^T do + A_ak^T dZ + (e k) E     dA_qk = do V^T  dA_qb = do U^T
    d(p q) = do S^T      d(e k) = V E^T      d(e b) = U E^T
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstc.kernels.common.gate import VectorGate
from mstc.kernels.common.segments import Body, Tokens
from mstc.kernels.common.triangular import inverse_unit_lower, scan_matrices

__all__ = ["BODY"]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """x_i . y_i for each token, kept as a last dimension of 1."""
    return (x * y).sum(-1, keepdim=True)


def forward(tokens: Tokens, shared: Tokens, state: Tensor) -> tuple[Tensor, Tensor]:
    """tokens: q (already scaled), k, v, a, b, g."""
    q, k, v, a, b, g = tokens
    gate = VectorGate(g)
    (a_qk, a_qb), (a_ak, a_ab) = gate.pairs([(q, False), (a, True)], [k, b])
    inverse = inverse_unit_lower(-a_ab)
    w, y = inverse @ (gate.before_start * a), inverse @ (a_ak @ v)
    k_end, b_end = gate.to_end * k, gate.to_end * b
    matrix = torch.diag_embed(gate.last) + b_end.mT @ w
    states = scan_matrices(matrix, k_end.mT @ v + b_end.mT @ y, state)
    before = torch.stack(states[:-1], 1)
    u = y + w @ before
    out = a_qk @ v + a_qb @ u + (gate.from_start * q) @ before
    return out + _dot(q, k) * v + _dot(q, b) * u, states[-1]


def backward(
    tokens: Tokens, shared: Tokens, state: Tensor, do: Tensor, grad_state: Tensor
) -> tuple[Tokens, Tokens, Tensor]:
    """See the module's docstring."""
    q, k, v, a, b, g = tokens
    gate = VectorGate(g)
    lefts = [(q, False), (a, True)]
    pairs = gate.pairs(lefts, [k, b])
    (a_qk, a_qb), (a_ak, a_ab) = pairs
    inverse = inverse_unit_lower(-a_ab)
    q_start, a_start, k_end, b_end = gate.from_start * q, gate.before_start * a, gate.to_end * k, gate.to_end * b
    w, y = inverse @ a_start, inverse @ (a_ak @ v)
    matrix = torch.diag_embed(gate.last) + b_end.mT @ w
    before = torch.stack(scan_matrices(matrix, k_end.mT @ v + b_end.mT @ y, state)[:-1], 1)
    u = y + w @ before
    du_local = a_qb.mT @ do + _dot(q, b) * do
    added = q_start.mT @ do + w.mT @ du_local
    grads = scan_matrices(matrix.mT.flip(1), added.flip(1), grad_state)
    after = torch.stack(grads[-2::-1], 1)
    dz = inverse.mT @ (du_local + b_end @ after)
    dv = a_qk.mT @ do + _dot(q, k) * do + a_ak.mT @ dz + k_end @ after
    dq_start, da_start = do @ before.mT, dz @ before.mT
    dk_end, db_end = v @ after.mT, u @ after.mT
    dpairs = [[do @ v.mT, do @ u.mT], [dz @ v.mT, dz @ u.mT]]
    (dq, da), (dk, db), dg = gate.pairs_backward(lefts, [k, b], pairs, dpairs)
    dself_k, dself_b = _dot(do, v), _dot(do, u)
    dq = dq + gate.from_start * dq_start + dself_k * k + dself_b * b
    da = da + gate.before_start * da_start
    dk = dk + gate.to_end * dk_end + dself_k * q
    db = db + gate.to_end * db_end + dself_b * q
    dstart = [(dq_start * q_start, False), (da_start * a_start, True)]
    dlast = gate.last * (after * before).sum(-1)
    dg = dg + gate.ends_backward(dstart, [dk_end * k_end + db_end * b_end], dlast)
    return (dq, dk, dv, da, db, dg), (), grads[-1]


BODY = Body(forward, backward)
