"""Linear attention with a scalar decay on a GPU: three kernels (the algebra is in ``chunked.py``).

``states_kernel`` walks the chunks of a sequence and writes the state before each; run in reverse on
(q, do) it writes the gradient of the state after each. ``output_kernel`` and ``gradients_kernel`` then
take every chunk at once. Running sums of log decays are float64, products accumulate in float32.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mstc.kernels.common.outputs import empty_outputs
from mstc.kernels.common.tables import ChunkTable, chunk_table, sequence_rows
from mstc.kernels.common.triton_blocks import load_rows, load_state, pick_tiles, store_rows, store_state

__all__ = ["WARPS", "backward", "forward", "gradients_kernel", "output_kernel", "states_kernel"]

WARPS = {"states": 8, "output": 8, "gradients": 8}
"""Warps per program: with 4, every kernel spills registers at K = V = 128 (``mstc.kernels.aot`` prints them)."""


@triton.jit
def load_sums(p_g, i_h, start, stop, H: tl.constexpr, BT: tl.constexpr, HAS_G: tl.constexpr):
    """G_i = g_start + .. + g_i and G_C in float64 (0 without a decay; padding adds 0)."""
    o_t = start + tl.arange(0, BT)
    b_g = tl.zeros([BT], dtype=tl.float64)
    if HAS_G:
        b_g = tl.load(p_g + o_t * H + i_h, mask=o_t < stop, other=0.0).to(tl.float64)
        b_g = tl.maximum(b_g, -1.0e4)
    return tl.cumsum(b_g, 0), tl.sum(b_g, 0)


@triton.jit
def pair_decays(b_sum, BT: tl.constexpr):
    """D_ij = exp(G_i - G_j) for j <= i, else 0."""
    o_i = tl.arange(0, BT)
    below = o_i[:, None] >= o_i[None, :]
    return tl.exp(tl.where(below, (b_sum[:, None] - b_sum[None, :]).to(tl.float32), float("-inf")))


@triton.jit
def states_kernel(
    p_x,
    p_y,
    p_g,
    p_first_state,
    p_h,
    p_last_state,
    p_starts,
    p_stops,
    p_first,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_STATE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """S <- exp(G_C) S + (w x)^T y over a sequence's chunks; p_h gets S as each chunk finds it.

    Forward: x = k, y = v, w = exp(G_C - G). Reverse: x = scale q, y = do, w = exp(G).
    """
    i_nh, i_k, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i_n, i_h = i_nh // H, i_nh % H
    first, last = tl.load(p_first + i_n), tl.load(p_first + i_n + 1)
    b_h = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_STATE:
        b_h += load_state(p_first_state, i_nh, i_k, i_v, K, V, BK, BV).to(tl.float32)
    for i in range(last - first):
        i_c = first + i
        if REVERSE:
            i_c = last - 1 - i
        start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
        store_state(p_h, b_h, i_c * H + i_h, i_k, i_v, K, V, BK, BV)
        b_x = load_rows(p_x, i_h, start, stop, i_k, H, K, BT, BK)
        b_y = load_rows(p_y, i_h, start, stop, i_v, H, V, BT, BV)
        b_sum, total = load_sums(p_g, i_h, start, stop, H, BT, HAS_G)
        if REVERSE:
            b_w = tl.exp(b_sum.to(tl.float32)) * scale
        else:
            b_w = tl.exp((total - b_sum).to(tl.float32))
        b_x = (b_x * b_w[:, None]).to(b_y.dtype)
        b_h = b_h * tl.exp(total.to(tl.float32)) + tl.dot(tl.trans(b_x), b_y, input_precision="ieee")
    store_state(p_last_state, b_h, i_nh, i_k, i_v, K, V, BK, BV)


@triton.jit
def output_kernel(
    p_q,
    p_k,
    p_v,
    p_g,
    p_h,
    p_o,
    p_starts,
    p_stops,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_G: tl.constexpr,
):
    """o = scale ((q k^T * D) v + exp(G) q S), one chunk and BV columns per program."""
    i_v, i_c, i_h = tl.program_id(1), tl.program_id(0).to(tl.int64), tl.program_id(2)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    b_sum, _ = load_sums(p_g, i_h, start, stop, H, BT, HAS_G)
    b_a = tl.zeros([BT, BT], dtype=tl.float32)
    b_o = tl.zeros([BT, BV], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        b_q = load_rows(p_q, i_h, start, stop, i_k, H, K, BT, BK)
        b_k = load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK)
        b_h = load_state(p_h, i_c * H + i_h, i_k, i_v, K, V, BK, BV)
        b_a += tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_o += tl.dot(b_q, b_h, input_precision="ieee")
    b_v = load_rows(p_v, i_h, start, stop, i_v, H, V, BT, BV)
    b_a = (b_a * pair_decays(b_sum, BT)).to(b_v.dtype)
    b_o = b_o * tl.exp(b_sum.to(tl.float32))[:, None] + tl.dot(b_a, b_v, input_precision="ieee")
    store_rows(p_o, b_o * scale, i_h, start, stop, i_v, H, V, BT, BV)


@triton.jit
def gradients_kernel(
    p_q,
    p_k,
    p_v,
    p_g,
    p_do,
    p_h,
    p_dh,
    p_dq,
    p_dk,
    p_dv,
    p_dg,
    p_starts,
    p_stops,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_G: tl.constexpr,
):
    """dq, dk, dv and dg of one chunk, from S before it (p_h) and the gradient of S after it (p_dh)."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    i_s = i_c * H + i_h
    b_sum, total = load_sums(p_g, i_h, start, stop, H, BT, HAS_G)
    b_start = tl.exp(b_sum.to(tl.float32))
    b_end = tl.exp((total - b_sum).to(tl.float32))
    b_d = pair_decays(b_sum, BT)
    b_a = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        b_q = load_rows(p_q, i_h, start, stop, i_k, H, K, BT, BK)
        b_k = load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK)
        b_a += tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_a *= b_d * scale
    b_da = tl.zeros([BT, BT], dtype=tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        b_do = load_rows(p_do, i_h, start, stop, i_v, H, V, BT, BV)
        b_v = load_rows(p_v, i_h, start, stop, i_v, H, V, BT, BV)
        b_da += tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_dv = tl.dot(tl.trans(b_a).to(b_do.dtype), b_do, input_precision="ieee")
        for i_k in range(tl.cdiv(K, BK)):
            b_k = load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK)
            b_dh = load_state(p_dh, i_s, i_k, i_v, K, V, BK, BV)
            b_dv += tl.dot((b_k * b_end[:, None]).to(b_dh.dtype), b_dh, input_precision="ieee")
        store_rows(p_dv, b_dv, i_h, start, stop, i_v, H, V, BT, BV)
    b_p = b_da * b_a
    b_da *= b_d * scale
    b_later = tl.zeros([BT], dtype=tl.float32)
    b_earlier = tl.zeros([BT], dtype=tl.float32)
    b_inner = tl.zeros([BK], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        b_dq = tl.zeros([BT, BK], dtype=tl.float32)
        b_dk = tl.zeros([BT, BK], dtype=tl.float32)
        for i_v in range(tl.cdiv(V, BV)):
            b_do = load_rows(p_do, i_h, start, stop, i_v, H, V, BT, BV)
            b_v = load_rows(p_v, i_h, start, stop, i_v, H, V, BT, BV)
            b_h = load_state(p_h, i_s, i_k, i_v, K, V, BK, BV)
            b_dh = load_state(p_dh, i_s, i_k, i_v, K, V, BK, BV)
            b_dq += tl.dot(b_do, tl.trans(b_h), input_precision="ieee")
            b_dk += tl.dot(b_v, tl.trans(b_dh), input_precision="ieee")
            b_inner += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)
        b_q = load_rows(p_q, i_h, start, stop, i_k, H, K, BT, BK)
        b_k = load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK)
        b_dq *= b_start[:, None] * scale
        b_dk *= b_end[:, None]
        b_later += tl.sum(b_q * b_dq, 1)
        b_earlier += tl.sum(b_k * b_dk, 1)
        b_dq += tl.dot(b_da.to(b_k.dtype), b_k, input_precision="ieee")
        b_dk += tl.dot(tl.trans(b_da).to(b_q.dtype), b_q, input_precision="ieee")
        store_rows(p_dq, b_dq, i_h, start, stop, i_k, H, K, BT, BK)
        store_rows(p_dk, b_dk, i_h, start, stop, i_k, H, K, BT, BK)
    if HAS_G:
        o_t = tl.arange(0, BT)
        before = o_t[:, None] > o_t[None, :]
        b_rows = tl.cumsum(b_p, 0, reverse=True)
        b_dg = tl.sum(tl.where(before, b_rows + b_earlier[None, :], 0.0), 1)
        b_dg += tl.sum(tl.where(before, 0.0, tl.trans(tl.broadcast_to(b_later[:, None], [BT, BT]))), 1)
        b_dg += tl.exp(total.to(tl.float32)) * tl.sum(b_inner, 0)
        mask = start + o_t < stop
        tl.store(p_dg + (start + o_t) * H + i_h, b_dg.to(p_dg.dtype.element_ty), mask=mask)


def _states(
    x: Tensor,
    y: Tensor,
    decay: Tensor | None,
    first_state: Tensor | None,
    table: ChunkTable,
    scale: float,
    tiles: dict[str, Any],
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """(states [chunks, H, K, V] as each chunk finds them, the last one [N, H, K, V])."""
    heads, key, value = x.shape[2], tiles["K"], tiles["V"]
    states = x.new_empty((table.chunks, heads, key, value))
    last = x.new_empty((table.sequences, heads, key, value), dtype=torch.float32)
    grid = (table.sequences * heads, triton.cdiv(key, tiles["BK"]), triton.cdiv(value, tiles["BV"]))
    states_kernel[grid](
        x,
        y,
        x if decay is None else decay,
        x if first_state is None else first_state,
        states,
        last,
        *table.span,
        table.first,
        scale,
        H=heads,
        **tiles,
        HAS_G=decay is not None,
        HAS_STATE=first_state is not None,
        REVERSE=reverse,
        num_warps=WARPS["states"],
    )
    return states, last


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final states, kept states); of the kept states only each sequence's first is filled."""
    out, _, kept = empty_outputs(q, v, cu_seqlens)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    decay = None if decay is None else decay.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    table = chunk_table(q.shape[0], q.shape[1], cu_seqlens, q.device)
    tiles = pick_tiles(q, v)
    states, final = _states(k, v, decay, initial_state, table, 1.0, tiles, False)
    kept.zero_()
    if initial_state is not None:
        kept[table.slots, sequence_rows(table, cu_seqlens)] = initial_state.to(kept.dtype)
    grid = (table.chunks, triton.cdiv(tiles["V"], tiles["BV"]), q.shape[2])
    gate = q if decay is None else decay
    output_kernel[grid](
        q,
        k,
        v,
        gate,
        states,
        out,
        *table.span,
        scale,
        H=q.shape[2],
        **tiles,
        HAS_G=decay is not None,
        num_warps=WARPS["output"],
    )
    return out, final, kept


def backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, decay (empty without one) and the initial states."""
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), grad_out.contiguous()
    decay = None if decay is None else decay.contiguous()
    table = chunk_table(q.shape[0], q.shape[1], cu_seqlens, q.device)
    tiles = pick_tiles(q, v)
    initial = kept[table.slots, sequence_rows(table, cu_seqlens)]
    states, _ = _states(k, v, decay, initial, table, 1.0, tiles, False)
    last = None if grad_final is None else grad_final.contiguous()
    grad_states, grad_initial = _states(q, do, decay, last, table, scale, tiles, True)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dg = q.new_empty(0) if decay is None else torch.empty_like(decay)
    gradients_kernel[(table.chunks, q.shape[2])](
        q,
        k,
        v,
        q if decay is None else decay,
        do,
        states,
        grad_states,
        dq,
        dk,
        dv,
        dg,
        *table.span,
        scale,
        H=q.shape[2],
        **tiles,
        HAS_G=decay is not None,
        num_warps=WARPS["gradients"],
    )
    return dq, dk, dv, dg, grad_initial
