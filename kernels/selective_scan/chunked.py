"""The selective scan, a segment at a time, all chunks of a segment side by side, in plain torch.

A chunk has L tokens. Step l is taken for every chunk at once, so that there are L steps per
segment, not one per token. Two sweeps: the first, from h = 0, gives each chunk's end state; the
chunks' states then follow from S_m = exp(A sum dt) S_{m-1} + end_m; the second sweep starts from
those. The backward is the same recurrence in reverse,

    dh_t = C_t dy_t + exp(dt_{t+1} A) dh_{t+1}

and, with W_t = dh_t exp(dt_t A) h_{t-1} and u = dt x,

    dA = sum_t W_t dt_t    ddt_t = sum_n W_t A + x_t du_t    dx = dt du    du_t = sum_n dh_t B_t
    dB_t = sum_d dh_t u_t  dC_t = sum_d dy_t h_t

Written for eager torch; ``blocks.py`` is what Inductor gets.
Layout in a segment: step, row, chunk, channel, column [L, X, M, D, N].
"""

from __future__ import annotations

import torch
from torch import Tensor

from mstc.kernels.common.segments import Span, count_states, spans, state_dtype

__all__ = ["SEGMENT_TOKENS", "STEPS", "run_backward", "run_forward"]

STEPS = 16
"""L: a longer chunk takes more steps, a shorter one a longer scan over the chunks' states."""
SEGMENT_TOKENS = 128
"""Tokens of a segment: what is worked on at once should stay near the cores."""


def _decays(dt: Tensor, a: Tensor) -> Tensor:
    return (dt.unsqueeze(-1) * a).exp_()


def _scan_chunks(total: Tensor, end: Tensor, initial: Tensor) -> list[Tensor]:
    """S_0 .. S_M with S_m = total_m S_{m-1} + end_m; total, end [X, M, D, N]."""
    states = [initial]
    for m in range(end.shape[1]):
        states.append(torch.addcmul(end[:, m], total[:, m], states[-1]))
    return states


def _states(decay: Tensor, dt: Tensor, a: Tensor, added: Tensor, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h of every token (in ``added``'s memory), the state before each chunk and the last state."""
    end = added[0]
    for i in range(1, STEPS):
        end = torch.addcmul(added[i], decay[i], end)
    states = _scan_chunks(_decays(dt.sum(0), a), end, initial)
    before = torch.stack(states[:-1], 1)
    added[0].addcmul_(decay[0], before)
    for i in range(1, STEPS):
        added[i].addcmul_(decay[i], added[i - 1])
    return added, before, states[-1]


def forward(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """x, dt [L, X, M, D], a [D, N], b, c [L, X, M, N], state [X, D, N] -> (y, state after)."""
    added = (dt * x).unsqueeze(-1) * b.unsqueeze(-2)
    h, _, last = _states(_decays(dt, a), dt, a, added, state)
    return (h @ c.unsqueeze(-1)).squeeze(-1), last


def backward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, dy: Tensor, grad_state: Tensor
) -> tuple[Tensor, ...]:
    """The gradients (dx, ddt, da, db, dc, dstate)."""
    u, decay = dt * x, _decays(dt, a)
    h, before, _ = _states(decay, dt, a, u.unsqueeze(-1) * b.unsqueeze(-2), state)
    dh = dy.unsqueeze(-1) * c.unsqueeze(-2)
    start = dh[-1]
    for i in range(STEPS - 2, -1, -1):
        start = torch.addcmul(dh[i], decay[i + 1], start)
    grads = _scan_chunks(_decays(dt.sum(0), a).flip(1), (decay[0] * start).flip(1), grad_state)
    dh[-1].add_(torch.stack(grads[-2::-1], 1))
    for i in range(STEPS - 2, -1, -1):
        dh[i].addcmul_(decay[i + 1], dh[i + 1])
    du, db = (dh @ b.unsqueeze(-1)).squeeze(-1), (u.unsqueeze(-2) @ dh).squeeze(-2)
    dc = (dy.unsqueeze(-2) @ h).squeeze(-2)
    decay[0].mul_(before)
    decay[1:].mul_(h[:-1])
    w = decay.mul_(dh)
    da = torch.einsum("lxmdn,lxmd->dn", w, dt)
    return dt * du, (w * a).sum(-1).addcmul_(x, du), da, db, dc, grads[-1]


def _load(tensor: Tensor, span: Span, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """[B, T, W] -> [L, X, M, W], padded with zeros: dt = 0 leaves the state as it is."""
    length = -(-(stop - start) // STEPS) * STEPS
    out = tensor.new_zeros((span.rows, length, tensor.shape[-1]), dtype=dtype)
    out[:, : stop - start] = tensor[span.row : span.row + span.rows, start:stop]
    return out.view(span.rows, length // STEPS, STEPS, -1).permute(2, 0, 1, 3).contiguous()


def _store(tensor: Tensor, part: Tensor, span: Span, start: int, stop: int) -> None:
    """The inverse of ``_load``."""
    flat = part.permute(1, 2, 0, 3).reshape(span.rows, -1, part.shape[-1])
    tensor[span.row : span.row + span.rows, start:stop] = flat[:, : stop - start]


def run_forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final states [S, D, N], the state at each segment's start [slot, B, D, N])."""
    batch, length, _ = x.shape
    dtype = state_dtype(x.dtype)
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y, matrix = x.new_empty(x.shape), a.to(dtype)
    final = x.new_zeros((documents or batch, *a.shape), dtype=dtype)
    kept = x.new_zeros((count_states(length, documents, SEGMENT_TOKENS), batch, *a.shape), dtype=dtype)
    if initial_state is not None:
        final.copy_(initial_state)
    for span in spans(batch, length, cu_seqlens, SEGMENT_TOKENS):
        rows, states = slice(span.row, span.row + span.rows), slice(span.state, span.state + span.rows)
        state = final[states].clone()
        for slot, start, stop in span.segments():
            kept[slot, rows] = state
            part = [_load(t, span, start, stop, dtype) for t in (x, dt, b, c)]
            out, state = forward(part[0], part[1], matrix, part[2], part[3], state)
            _store(y, out, span, start, stop)
        final[states] = state
    return y, final, kept


def run_backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """(dx, ddt, da, db, dc, gradient of the initial states)."""
    batch, length, _ = x.shape
    dtype = kept.dtype
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grads = [t.new_empty(t.shape) for t in (x, dt, b, c)]
    matrix, da = a.to(dtype), torch.zeros_like(a, dtype=dtype, memory_format=torch.contiguous_format)
    initial = kept.new_zeros((documents or batch, *a.shape))
    if grad_final is not None:
        initial.copy_(grad_final)
    for span in spans(batch, length, cu_seqlens, SEGMENT_TOKENS):
        rows, states = slice(span.row, span.row + span.rows), slice(span.state, span.state + span.rows)
        grad_state = initial[states].clone()
        for slot, start, stop in reversed(list(span.segments())):
            part = [_load(t, span, start, stop, dtype) for t in (x, dt, b, c, grad_out)]
            state = kept[slot, rows].clone()
            dx, ddt, da_part, db, dc, grad_state = backward(
                part[0], part[1], matrix, part[2], part[3], state, part[4], grad_state
            )
            da += da_part
            for grad, found in zip(grads, (dx, ddt, db, dc), strict=True):
                _store(grad, found, span, start, stop)
        initial[states] = grad_state
    dx, ddt, db, dc = grads
    return dx, ddt, da.to(a.dtype), db, dc, initial
