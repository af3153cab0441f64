"""How linear attention is split over a sequence: local part, prefix combine, output correction.

Over tokens a .. b the state goes S -> A S + B. A part of the sequence needs no other part to know
its (A, B) and its output from a zero state; parts are joined by

    (A1, B1) then (A2, B2)  =  (A2 A1, A2 B1 + B2)                (combine; associative)
    o = o_local + scale * q_t A_t S                               (correct; A_t up to token t)

A is a number per head (scalar decay), a vector [K] (decay over K) or, with the delta rule, a
matrix [K, K]; A is never formed per token. All three steps are differentiable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mstc.kernels.api import linear_attention
from mstc.kernels.common.gates import FLOOR

__all__ = ["Prefix", "apply", "combine", "correct", "local"]


class Prefix(NamedTuple):
    """What a part does to the state: S -> A S + B, A [B, H, 1 or K] or [B, H, K, K], B [B, H, K, V]."""

    transition: Tensor
    state: Tensor


def local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Prefix]:
    """The output of a part that starts from a zero state, and what the part does to a state."""
    out, state = linear_attention(q, k, v, decay=decay, beta=beta, scale=scale, output_final_state=True)
    return out, Prefix(_transition(k, decay, beta, state.dtype), state)


def combine(first: Prefix, second: Prefix) -> Prefix:
    """``first``, then ``second``."""
    if second.transition.dim() == 4:
        return Prefix(second.transition @ first.transition, apply(second, first.state))
    return Prefix(second.transition * first.transition, apply(second, first.state))


def apply(part: Prefix, state: Tensor) -> Tensor:
    """A S + B."""
    if part.transition.dim() == 4:
        return part.transition @ state + part.state
    return part.transition.unsqueeze(-1) * state + part.state


def correct(
    q: Tensor,
    k: Tensor,
    state: Tensor,
    *,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """What the state before a part adds to the part's local output, [B, T, H, V] in the state's dtype.

    The output is linear in (v, S): it is the output for v = 0.
    """
    if beta is not None:
        zero = q.new_zeros(*q.shape[:3], state.shape[-1])
        return linear_attention(q, k, zero, decay=decay, beta=beta, scale=scale, initial_state=state)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weighted = q.to(state.dtype) * scale
    if decay is not None:
        weighted = weighted * _spread(decay, q).cumsum(1).exp().to(state.dtype)
    return torch.einsum("bthk,bhkv->bthv", weighted, state)


def _spread(decay: Tensor, like: Tensor) -> Tensor:
    """The log decay as float64 [B, T, H, 1 or K]."""
    if decay.dim() == 1:
        decay = decay.expand(like.shape[:3])
    return (decay if decay.dim() == 4 else decay.unsqueeze(-1)).double().clamp(min=FLOOR)


def _transition(k: Tensor, decay: Tensor | None, beta: Tensor | None, dtype: torch.dtype) -> Tensor:
    batch, _, heads, key = k.shape
    if beta is not None:
        one = torch.eye(key, dtype=dtype, device=k.device).expand(batch, heads, key, key)
        zero = torch.zeros_like(k)
        _, matrix = linear_attention(zero, k, zero, decay=decay, beta=beta, initial_state=one, output_final_state=True)
        return matrix
    if decay is None:
        return torch.ones(batch, heads, 1, dtype=dtype, device=k.device)
    return _spread(decay, k).sum(1).exp().to(dtype)
