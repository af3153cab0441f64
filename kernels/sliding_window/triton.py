"""Sliding-window attention with sinks on a GPU: an online softmax over the keys that a block of queries sees.

``forward_kernel`` and ``dq_kernel`` take a block of queries per program and walk first the sinks that lie
before the window, then the window; ``dkv_kernel`` takes a block of keys and walks the queries that see it.
The probabilities of the backward come from the log-sum-exp (``chunked.py``).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mstc.kernels.common.segments import CHUNK
from mstc.kernels.common.tables import chunk_table

__all__ = ["STAGES", "WARPS", "backward", "dkv_kernel", "dq_kernel", "forward", "forward_kernel"]

WARPS = {"forward": 8, "dq": 8, "dkv": 8}
"""Warps per program (registers and spills: ``mstc.kernels.aot``)."""
STAGES = 2
"""Loads in flight per loop: with 3, dq in float32 takes 100 KiB of shared memory, over the 99 of sm_8x."""


@triton.jit
def load_tile(p_x, i_h, start, stop, H: tl.constexpr, W: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr):
    """Rows start .. stop of [tokens, H, W] as [BR, BW], zero outside."""
    o_r = start + tl.arange(0, BR)
    o_w = tl.arange(0, BW)
    mask = (o_r[:, None] < stop) & (o_w[None, :] < W)
    return tl.load(p_x + (o_r[:, None] * H + i_h) * W + o_w[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(p_x, b_x, i_h, start, stop, H: tl.constexpr, W: tl.constexpr, BR: tl.constexpr, BW: tl.constexpr):
    """The inverse of ``load_tile``."""
    o_r = start + tl.arange(0, BR)
    o_w = tl.arange(0, BW)
    mask = (o_r[:, None] < stop) & (o_w[None, :] < W)
    tl.store(p_x + (o_r[:, None] * H + i_h) * W + o_w[None, :], b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def seen(o_i, o_j, i_stop, j_stop, origin, window, sinks):
    """Which queries o_i see which keys o_j."""
    near = (o_i[:, None] - o_j[None, :] < window) | (o_j[None, :] - origin < sinks)
    inside = (o_i[:, None] < i_stop) & (o_j[None, :] < j_stop)
    return (o_j[None, :] <= o_i[:, None]) & near & inside


@triton.jit
def attend(
    b_q, b_o, b_m, b_l, p_k, p_v, i_h, start, stop, i_j, j_stop, origin, window, sinks, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, over keys i_j .. j_stop."""
    b_k = load_tile(p_k, i_h, i_j, j_stop, H, K, BS, BK)
    b_v = load_tile(p_v, i_h, i_j, j_stop, H, V, BS, BV)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    mask = seen(start + tl.arange(0, BT), i_j + tl.arange(0, BS), stop, j_stop, origin, window, sinks)
    b_s = tl.where(mask, b_s, float("-inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp(b_s - b_safe[:, None])
    b_keep = tl.exp(b_m - b_safe)
    b_o = b_o * b_keep[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee")
    return b_o, b_new, b_l * b_keep + tl.sum(b_p, 1)


@triton.jit
def forward_kernel(
    p_q, p_k, p_v, p_o, p_lse, p_starts, p_stops, p_origins, window, sinks, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """o and log-sum-exp of one block of queries."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    start, stop, origin = tl.load(p_starts + i_c), tl.load(p_stops + i_c), tl.load(p_origins + i_c)
    b_q = load_tile(p_q, i_h, start, stop, H, K, BT, BK)
    b_o = tl.zeros([BT, BV], dtype=tl.float32)
    b_m = tl.full([BT], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BT], dtype=tl.float32)
    low = tl.maximum(origin, start - window + 1)
    head = tl.minimum(origin + sinks, low)
    for i_j in range(origin, head, BS):
        b_o, b_m, b_l = attend(
            b_q, b_o, b_m, b_l, p_k, p_v, i_h, start, stop, i_j, head, origin, window, sinks, scale,
            H, K, V, BT, BS, BK, BV,
        )  # fmt: skip
    for i_j in range(low, stop, BS):
        b_o, b_m, b_l = attend(
            b_q, b_o, b_m, b_l, p_k, p_v, i_h, start, stop, i_j, stop, origin, window, sinks, scale,
            H, K, V, BT, BS, BK, BV,
        )  # fmt: skip
    b_l = tl.where(b_l == 0.0, 1.0, b_l)
    store_tile(p_o, b_o / b_l[:, None], i_h, start, stop, H, V, BT, BV)
    o_t = start + tl.arange(0, BT)
    tl.store(p_lse + o_t * H + i_h, b_m + tl.log(b_l), mask=o_t < stop)


@triton.jit
def scores_gradient(
    b_q, b_k, b_v, b_do, b_lse, b_shift, mask, scale,
):  # fmt: skip
    """(P, dS) of a tile; dS in the dtype of the inputs."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    b_p = tl.where(mask, tl.exp(tl.where(mask, b_s - b_lse[:, None], 0.0)), 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    return b_p, b_p * (b_dp + b_shift[:, None])


@triton.jit
def dq_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_shift, p_dq, p_starts, p_stops, p_origins, window, sinks, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """dq of one block of queries."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    start, stop, origin = tl.load(p_starts + i_c), tl.load(p_stops + i_c), tl.load(p_origins + i_c)
    o_i = start + tl.arange(0, BT)
    b_q = load_tile(p_q, i_h, start, stop, H, K, BT, BK)
    b_do = load_tile(p_do, i_h, start, stop, H, V, BT, BV)
    b_lse = tl.load(p_lse + o_i * H + i_h, mask=o_i < stop, other=0.0)
    b_shift = tl.load(p_shift + o_i * H + i_h, mask=o_i < stop, other=0.0)
    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    low = tl.maximum(origin, start - window + 1)
    head = tl.minimum(origin + sinks, low)
    for i_j in range(origin, head, BS):
        b_k = load_tile(p_k, i_h, i_j, head, H, K, BS, BK)
        b_v = load_tile(p_v, i_h, i_j, head, H, V, BS, BV)
        mask = seen(o_i, i_j + tl.arange(0, BS), stop, head, origin, window, sinks)
        _, b_ds = scores_gradient(b_q, b_k, b_v, b_do, b_lse, b_shift, mask, scale)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
    for i_j in range(low, stop, BS):
        b_k = load_tile(p_k, i_h, i_j, stop, H, K, BS, BK)
        b_v = load_tile(p_v, i_h, i_j, stop, H, V, BS, BV)
        mask = seen(o_i, i_j + tl.arange(0, BS), stop, stop, origin, window, sinks)
        _, b_ds = scores_gradient(b_q, b_k, b_v, b_do, b_lse, b_shift, mask, scale)
        b_dq += tl.dot(b_ds.to(b_k.dtype), b_k, input_precision="ieee")
    store_tile(p_dq, b_dq * scale, i_h, start, stop, H, K, BT, BK)


@triton.jit
def dkv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_shift, p_dk, p_dv, p_starts, p_stops, p_origins, p_ends, window, sinks, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """dk and dv of one block of keys: its queries end a window later, or at the sequence's end if it holds sinks."""
    i_c, i_h = tl.program_id(0), tl.program_id(1)
    start, stop, origin = tl.load(p_starts + i_c), tl.load(p_stops + i_c), tl.load(p_origins + i_c)
    end = tl.load(p_ends + i_c)
    b_k = load_tile(p_k, i_h, start, stop, H, K, BT, BK)
    b_v = load_tile(p_v, i_h, start, stop, H, V, BT, BV)
    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    b_dv = tl.zeros([BT, BV], dtype=tl.float32)
    last = tl.where(start - origin < sinks, end, tl.minimum(end, stop + window - 1))
    for i_i in range(start, last, BS):
        o_i = i_i + tl.arange(0, BS)
        b_q = load_tile(p_q, i_h, i_i, last, H, K, BS, BK)
        b_do = load_tile(p_do, i_h, i_i, last, H, V, BS, BV)
        b_lse = tl.load(p_lse + o_i * H + i_h, mask=o_i < last, other=0.0)
        b_shift = tl.load(p_shift + o_i * H + i_h, mask=o_i < last, other=0.0)
        mask = seen(o_i, start + tl.arange(0, BT), last, stop, origin, window, sinks)
        b_p, b_ds = scores_gradient(b_q, b_k, b_v, b_do, b_lse, b_shift, mask, scale)
        b_dk += tl.dot(tl.trans(b_ds).to(b_q.dtype), b_q, input_precision="ieee")
        b_dv += tl.dot(tl.trans(b_p).to(b_do.dtype), b_do, input_precision="ieee")
    store_tile(p_dk, b_dk * scale, i_h, start, stop, H, K, BT, BK)
    store_tile(p_dv, b_dv, i_h, start, stop, H, V, BT, BV)


def _blocks(q: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(first token, end, first token of the sequence, end of the sequence) of each block."""
    table = chunk_table(q.shape[0], q.shape[1], cu_seqlens, q.device)
    blocks = torch.arange(table.chunks, device=q.device)
    sequence = torch.searchsorted(table.first[1:].contiguous(), blocks, right=True)
    origins = table.starts[table.first[sequence]]
    ends = table.stops[table.first[sequence + 1] - 1]
    return *table.span, origins, ends


def _tiles(q: Tensor, v: Tensor) -> dict[str, Any]:
    key, value = (max(16, triton.next_power_of_2(x.shape[-1])) for x in (q, v))
    step = 32 if q.element_size() <= 2 else 16  # 4-byte inputs take twice the shared memory
    return {"H": q.shape[2], "K": q.shape[-1], "V": v.shape[-1], "BT": CHUNK, "BS": step, "BK": key, "BV": value}


def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor]:
    """(o [B, T, H, V], log-sum-exp [B, T, H])."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = v.new_empty(v.shape), q.new_empty(q.shape[:3], dtype=torch.float32)
    starts, stops, origins, _ = _blocks(q, cu_seqlens)
    grid = (starts.shape[0], q.shape[2])
    forward_kernel[grid](
        q,
        k,
        v,
        out,
        lse,
        starts,
        stops,
        origins,
        window,
        sinks,
        scale,
        **_tiles(q, v),
        num_warps=WARPS["forward"],
        num_stages=STAGES,
    )
    return out, lse


def backward(
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
    """(dq, dk, dv)."""
    q, k, v, do = q.contiguous(), k.contiguous(), v.contiguous(), grad_out.contiguous()
    shift = -(do.float() * out.float()).sum(-1)
    shift = (shift if grad_lse is None else shift + grad_lse).contiguous()
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    starts, stops, origins, ends = _blocks(q, cu_seqlens)
    grid, tiles = (starts.shape[0], q.shape[2]), _tiles(q, v)
    shared = (q, k, v, do, lse, shift)
    dq_kernel[grid](
        *shared, dq, starts, stops, origins, window, sinks, scale, **tiles, num_warps=WARPS["dq"], num_stages=STAGES
    )
    dkv_kernel[grid](
        *shared,
        dk,
        dv,
        starts,
        stops,
        origins,
        ends,
        window,
        sinks,
        scale,
        **tiles,
        num_warps=WARPS["dkv"],
        num_stages=STAGES,
    )
    return dq, dk, dv
