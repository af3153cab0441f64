"""Blocks of rows and of states, as the Triton kernels of the recurrences load and store them."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mstc.kernels.common.segments import CHUNK

__all__ = ["load_rows", "load_state", "pick_tiles", "store_rows", "store_state"]


@triton.jit
def load_rows(p_x, i_h, start, stop, i_w, H: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """Rows start .. stop of [tokens, H, W], columns of block i_w: [BT, BW], zero outside."""
    o_t = start + tl.arange(0, BT)
    o_w = i_w * BW + tl.arange(0, BW)
    mask = (o_t[:, None] < stop) & (o_w[None, :] < W)
    return tl.load(p_x + (o_t[:, None] * H + i_h) * W + o_w[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(p_x, b_x, i_h, start, stop, i_w, H: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """The inverse of ``load_rows``."""
    o_t = start + tl.arange(0, BT)
    o_w = i_w * BW + tl.arange(0, BW)
    mask = (o_t[:, None] < stop) & (o_w[None, :] < W)
    tl.store(p_x + (o_t[:, None] * H + i_h) * W + o_w[None, :], b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def load_state(p_h, i_s, i_k, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Block (i_k, i_v) of state i_s of [states, K, V]."""
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    mask = (o_k[:, None] < K) & (o_v[None, :] < V)
    return tl.load(p_h + (i_s * K + o_k[:, None]) * V + o_v[None, :], mask=mask, other=0.0)


@triton.jit
def store_state(p_h, b_h, i_s, i_k, i_v, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """The inverse of ``load_state``."""
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    mask = (o_k[:, None] < K) & (o_v[None, :] < V)
    tl.store(p_h + (i_s * K + o_k[:, None]) * V + o_v[None, :], b_h.to(p_h.dtype.element_ty), mask=mask)


def pick_tiles(q: Tensor, v: Tensor) -> dict[str, Any]:
    """Tile sizes: powers of two from 16, at most 64 (32 for 4-byte inputs, which take twice the shared memory)."""
    largest = 64 if q.element_size() <= 2 else 32
    key, value = (min(largest, max(16, triton.next_power_of_2(x.shape[-1]))) for x in (q, v))
    return {"K": q.shape[-1], "V": v.shape[-1], "BT": CHUNK, "BK": key, "BV": value}
