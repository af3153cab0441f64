"""The delta rule with a decay over K on a GPU: a diagonal plus rank one transition, by that class's kernels.

    S_t = diag(exp(g)) S + b^T (a S) + (beta k)^T v,   S = S_{t-1},   a = exp(g) k,   b = -beta k

since k reads after the decay. Backward, through the products:

    dk = beta (d(beta k) - db) + exp(g) da      dbeta = k . (d(beta k) - db)      dg += a da
"""
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from torch import Tensor

from mstc.kernels.dplr import triton as dplr

__all__ = ["backward", "forward"]


def _operands(k: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(beta k, a, b) in k's dtype."""
    added = (k * beta.unsqueeze(-1)).to(k.dtype)
    return added, (k * decay.exp()).to(k.dtype), -added


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``triton.forward``, for a decay [B, T, H, K]."""
    added, a, b = _operands(k, decay, beta)
    return dplr.forward(q, added, v, a, b, decay, initial_state, cu_seqlens, scale)


def backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As ``triton.backward``, for a decay [B, T, H, K]."""
    added, a, b = _operands(k, decay, beta)
    dq, dadded, dv, da, db, dg, grad_initial = dplr.backward(
        grad_out, grad_final, q, added, v, a, b, decay, kept, cu_seqlens, scale
    )
    through_beta = dadded.float() - db
    dk = through_beta * beta.unsqueeze(-1) + da * decay.float().exp()
    dbeta = (through_beta * k).sum(-1)
    return dq, dk.to(k.dtype), dv, (dg + da.float() * a).to(decay.dtype), dbeta.to(beta.dtype), grad_initial
