"""Mamba's selective scan on a GPU (the recurrences are in ``chunked.py``).

``states_kernel`` walks a sequence's tokens, BD channels per program, and writes the state before each
chunk; in reverse it writes the gradient of the state after each. ``output_kernel`` and ``gradients_kernel``
then take every chunk at once: from the state at its edge a chunk needs no other. A program keeps its
[BD, N] state in registers, and in ``gradients_kernel`` walks the chunk backwards from states that it wrote
itself, one slot of scratch per program.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mstc.kernels.common.segments import CHUNK, count_states
from mstc.kernels.common.tables import ChunkTable, chunk_table

__all__ = ["WARPS", "backward", "forward", "gradients_kernel", "output_kernel", "states_kernel"]

WARPS = {"states": 1, "output": 1, "gradients": 1}
BLOCK = 32
"""BD: channels per program, one per thread."""


@triton.jit
def load_row(p_x, i_t, o_w, W: tl.constexpr):
    """Row i_t of [tokens, W] in float32, zero outside."""
    return tl.load(p_x + i_t * W + o_w, mask=o_w < W, other=0.0).to(tl.float32)


@triton.jit
def states_kernel(
    p_x, p_dt, p_a, p_b, p_first_state, p_h, p_last_state, p_starts, p_stops, p_first,
    D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, HAS_STATE: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """h <- exp(dt A) h + dt x B (reverse: h <- exp(dt A) (h + x B)); p_h gets h as each chunk finds it.

    In reverse x is dy and B is C: what is carried is the gradient of the state before the token.
    """
    i_n, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d, o_n = i_d * BD + tl.arange(0, BD), tl.arange(0, BN)
    mask = (o_d[:, None] < D) & (o_n[None, :] < N)
    o_s = o_d[:, None] * N + o_n[None, :]
    b_a = tl.load(p_a + o_s, mask=mask, other=0.0).to(tl.float32)
    b_h = tl.zeros([BD, BN], dtype=tl.float32)
    if HAS_STATE:
        b_h += tl.load(p_first_state + i_n * D * N + o_s, mask=mask, other=0.0).to(tl.float32)
    first, last = tl.load(p_first + i_n), tl.load(p_first + i_n + 1)
    for i in range(last - first):
        i_c = first + i
        if REVERSE:
            i_c = last - 1 - i
        start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
        tl.store(p_h + i_c * D * N + o_s, b_h, mask=mask)
        for j in range(stop - start):
            i_t = start + j
            if REVERSE:
                i_t = stop - 1 - j
            b_x, b_dt, b_b = load_row(p_x, i_t, o_d, D), load_row(p_dt, i_t, o_d, D), load_row(p_b, i_t, o_n, N)
            b_w = tl.exp(b_dt[:, None] * b_a)
            if REVERSE:
                b_h = b_w * (b_h + b_x[:, None] * b_b[None, :])
            else:
                b_h = b_w * b_h + (b_dt * b_x)[:, None] * b_b[None, :]
    tl.store(p_last_state + i_n * D * N + o_s, b_h, mask=mask)


@triton.jit
def output_kernel(
    p_x, p_dt, p_a, p_b, p_c, p_h, p_y, p_starts, p_stops,
    D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y of one chunk and BD channels."""
    i_c, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_d, o_n = i_d * BD + tl.arange(0, BD), tl.arange(0, BN)
    mask = (o_d[:, None] < D) & (o_n[None, :] < N)
    o_s = o_d[:, None] * N + o_n[None, :]
    b_a = tl.load(p_a + o_s, mask=mask, other=0.0).to(tl.float32)
    b_h = tl.load(p_h + i_c * D * N + o_s, mask=mask, other=0.0)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    for i_t in range(start, stop):
        b_x, b_dt = load_row(p_x, i_t, o_d, D), load_row(p_dt, i_t, o_d, D)
        b_b, b_c = load_row(p_b, i_t, o_n, N), load_row(p_c, i_t, o_n, N)
        b_h = tl.exp(b_dt[:, None] * b_a) * b_h + (b_dt * b_x)[:, None] * b_b[None, :]
        b_y = tl.sum(b_h * b_c[None, :], 1)
        tl.store(p_y + i_t * D + o_d, b_y.to(p_y.dtype.element_ty), mask=o_d < D)


@triton.jit
def gradients_kernel(
    p_x, p_dt, p_a, p_b, p_c, p_dy, p_h, p_dh, p_scratch, p_dx, p_ddt, p_da, p_db, p_dc, p_starts, p_stops,
    chunks, tokens,
    D: tl.constexpr, N: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dx, ddt of some chunks and BD channels, and this block's share of dA [programs], dB, dC [channel blocks].

    Program i takes chunks i, i + programs, ..: the scratch [programs, BT, D, N] does not grow with T.
    """
    i_p, i_d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_d, o_n = i_d * BD + tl.arange(0, BD), tl.arange(0, BN)
    mask = (o_d[:, None] < D) & (o_n[None, :] < N)
    o_s = o_d[:, None] * N + o_n[None, :]
    b_a = tl.load(p_a + o_s, mask=mask, other=0.0).to(tl.float32)
    b_da = tl.zeros([BD, BN], dtype=tl.float32)
    p_own = p_scratch + i_p * BT * D * N + o_s
    for i_c in range(i_p, chunks, tl.num_programs(0)):
        start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
        b_h = tl.load(p_h + i_c * D * N + o_s, mask=mask, other=0.0)
        for j in range(stop - start):
            tl.store(p_own + j * D * N, b_h, mask=mask)
            i_t = start + j
            b_x, b_dt, b_b = load_row(p_x, i_t, o_d, D), load_row(p_dt, i_t, o_d, D), load_row(p_b, i_t, o_n, N)
            b_h = tl.exp(b_dt[:, None] * b_a) * b_h + (b_dt * b_x)[:, None] * b_b[None, :]
        b_g = tl.load(p_dh + i_c * D * N + o_s, mask=mask, other=0.0)
        for j in range(stop - start):
            i_t = stop - 1 - j
            b_x, b_dt, b_dy = load_row(p_x, i_t, o_d, D), load_row(p_dt, i_t, o_d, D), load_row(p_dy, i_t, o_d, D)
            b_b, b_c = load_row(p_b, i_t, o_n, N), load_row(p_c, i_t, o_n, N)
            b_before = tl.load(p_own + (stop - 1 - j - start) * D * N, mask=mask, other=0.0)
            b_w = tl.exp(b_dt[:, None] * b_a)
            b_h = b_w * b_before + (b_dt * b_x)[:, None] * b_b[None, :]
            b_g += b_dy[:, None] * b_c[None, :]
            b_du = tl.sum(b_g * b_b[None, :], 1)
            b_decay = b_g * b_w * b_before
            b_da += b_decay * b_dt[:, None]
            b_ddt = tl.sum(b_decay * b_a, 1) + b_x * b_du
            tl.store(p_dx + i_t * D + o_d, (b_dt * b_du).to(p_dx.dtype.element_ty), mask=o_d < D)
            tl.store(p_ddt + i_t * D + o_d, b_ddt.to(p_ddt.dtype.element_ty), mask=o_d < D)
            o_row = (i_d * tokens + i_t) * N + o_n
            tl.store(p_db + o_row, tl.sum(b_g * (b_dt * b_x)[:, None], 0), mask=o_n < N)
            tl.store(p_dc + o_row, tl.sum(b_h * b_dy[:, None], 0), mask=o_n < N)
            b_g = b_w * b_g
    tl.store(p_da + i_p * D * N + o_s, b_da, mask=mask)


def _tiles(a: Tensor) -> dict[str, Any]:
    channels, columns = a.shape
    return {"D": channels, "N": columns, "BD": BLOCK, "BN": max(2, triton.next_power_of_2(columns))}


def _states(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, first_state: Tensor | None, table: ChunkTable, reverse: bool
) -> tuple[Tensor, Tensor]:
    """(states [chunks, D, N] as each chunk finds them, the last one [S, D, N])."""
    states = x.new_empty((table.chunks, *a.shape), dtype=torch.float32)
    last = x.new_empty((table.sequences, *a.shape), dtype=torch.float32)
    states_kernel[(table.sequences, triton.cdiv(a.shape[0], BLOCK))](
        x,
        dt,
        a,
        b,
        x if first_state is None else first_state.contiguous(),
        states,
        last,
        *table.span,
        table.first,
        **_tiles(a),
        HAS_STATE=first_state is not None,
        REVERSE=reverse,
        num_warps=WARPS["states"],
    )
    return states, last


def forward(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final states, kept states); of the kept states only each sequence's first is filled."""
    x, dt, a, b, c = (t.contiguous() for t in (x, dt, a, b, c))
    batch, tokens, _ = x.shape
    table = chunk_table(batch, tokens, cu_seqlens, x.device)
    states, final = _states(x, dt, a, b, initial_state, table, False)
    documents = None if cu_seqlens is None else table.sequences
    kept = x.new_zeros((count_states(tokens, documents), batch, *a.shape), dtype=torch.float32)
    if initial_state is not None:
        kept[table.slots, _rows(table, cu_seqlens)] = initial_state.float()
    y = x.new_empty(x.shape)
    grid = (table.chunks, triton.cdiv(a.shape[0], BLOCK))
    output_kernel[grid](x, dt, a, b, c, states, y, *table.span, **_tiles(a), num_warps=WARPS["output"])
    return y, final, kept


def _rows(table: ChunkTable, cu_seqlens: Tensor | None) -> Tensor:
    """The row of the batch in which each sequence lies."""
    rows = torch.arange(table.sequences, device=table.slots.device)
    return rows if cu_seqlens is None else torch.zeros_like(rows)


def backward(
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
    """(dx, ddt, da, db, dc, gradient of the initial states); sums over programs are made in a fixed order."""
    x, dt, a, b, c, dy = (t.contiguous() for t in (x, dt, a, b, c, grad_out))
    batch, tokens, channels = x.shape
    table = chunk_table(batch, tokens, cu_seqlens, x.device)
    states, _ = _states(x, dt, a, b, kept[table.slots, _rows(table, cu_seqlens)], table, False)
    grad_states, initial = _states(dy, dt, a, c, grad_final, table, True)
    programs, blocks = min(table.chunks, 128), triton.cdiv(channels, BLOCK)
    scratch = x.new_empty((programs, CHUNK, *a.shape), dtype=torch.float32)
    dx, ddt = torch.empty_like(x), torch.empty_like(dt)
    da = x.new_empty((programs, *a.shape), dtype=torch.float32)
    db, dc = (x.new_empty((blocks, *t.shape), dtype=torch.float32) for t in (b, c))
    gradients_kernel[(programs, blocks)](
        x,
        dt,
        a,
        b,
        c,
        dy,
        states,
        grad_states,
        scratch,
        dx,
        ddt,
        da,
        db,
        dc,
        *table.span,
        table.chunks,
        batch * tokens,
        **_tiles(a),
        BT=CHUNK,
        num_warps=WARPS["gradients"],
    )
    return dx, ddt, da.sum(0).to(a.dtype), db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype), initial
