"""(I + L)^-1 and its products with rows, one chunk per program, for the classes that solve inside a chunk.

L is strictly lower triangular, [chunks, H, C, C]. Blocks of 16 tokens on the diagonal are inverted by forward
substitution, the rest follows by forward substitution over those blocks: no powers of L (see ``triangular.py``).
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mstc.kernels.common.segments import CHUNK
from mstc.kernels.common.tables import ChunkTable
from mstc.kernels.common.triton_blocks import load_rows, store_rows

__all__ = [
    "WARPS",
    "apply_kernel",
    "apply_square",
    "inverse_kernel",
    "invert",
    "load_scalars",
    "load_square",
    "scan_tiles",
    "store_square",
]

WARPS = {"inverse": 4, "apply": 8}


@triton.jit
def load_scalars(p_x, i_h, start, stop, H: tl.constexpr, BT: tl.constexpr):
    """Rows start .. stop of [tokens, H]: [BT] in float32, zero outside."""
    o_t = start + tl.arange(0, BT)
    return tl.load(p_x + o_t * H + i_h, mask=o_t < stop, other=0.0).to(tl.float32)


@triton.jit
def load_square(p_x, i_s, BT: tl.constexpr):
    """Matrix i_s of [matrices, BT, BT]."""
    o_t = tl.arange(0, BT)
    return tl.load(p_x + (i_s * BT + o_t[:, None]) * BT + o_t[None, :])


@triton.jit
def store_square(p_x, b_x, i_s, BT: tl.constexpr):
    """The inverse of ``load_square``."""
    o_t = tl.arange(0, BT)
    tl.store(p_x + (i_s * BT + o_t[:, None]) * BT + o_t[None, :], b_x.to(p_x.dtype.element_ty))


@triton.jit
def inverse_of_diagonal(p_l, BT: tl.constexpr, BC: tl.constexpr):
    """The inverses of I + L on the diagonal, [BT / BC, BC, BC]: x_i = e_i - sum_j L_ij x_j, row by row."""
    o_b = tl.arange(0, BT // BC)[:, None, None] * BC
    o_i, o_j = tl.arange(0, BC)[None, :, None], tl.arange(0, BC)[None, None, :]
    b_turned = tl.load(p_l + (o_b + o_j) * BT + o_b + o_i)
    b_x = tl.where(o_i == o_j, 1.0, tl.zeros([BT // BC, BC, BC], dtype=tl.float32))
    for i in range(1, BC):
        b_row = tl.sum(tl.where(o_j == i, b_turned, 0.0), 2)
        b_known = tl.sum(b_row[:, :, None] * b_x, 1)
        b_x = tl.where(o_i == i, b_x - b_known[:, None, :], b_x)
    return b_x


@triton.jit
def block_rows(b_x, p_l, b_x0, b_x1, b_x2, i: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    """Rows of block i of the inverse, [BC, BT], from those of the blocks before it."""
    o_i, o_j = tl.arange(0, BC)[:, None], tl.arange(0, BC)[None, :]
    b_rest = tl.where(i * BC + o_i == tl.arange(0, BT)[None, :], 1.0, tl.zeros([BC, BT], dtype=tl.float32))
    p_row = p_l + (i * BC + o_i) * BT + o_j
    if i > 0:
        b_rest -= tl.dot(tl.load(p_row), b_x0, input_precision="ieee")
    if i > 1:
        b_rest -= tl.dot(tl.load(p_row + BC), b_x1, input_precision="ieee")
    if i > 2:
        b_rest -= tl.dot(tl.load(p_row + 2 * BC), b_x2, input_precision="ieee")
    b_corner = tl.sum(tl.where(tl.arange(0, BT // BC)[:, None, None] == i, b_x, 0.0), 0)
    return tl.dot(b_corner, b_rest, input_precision="ieee")


@triton.jit
def store_block(p_x, b_x, i: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr):
    o_i = i * BC + tl.arange(0, BC)
    tl.store(p_x + o_i[:, None] * BT + tl.arange(0, BT)[None, :], b_x.to(p_x.dtype.element_ty))


@triton.jit
def inverse_kernel(p_l, p_x, BT: tl.constexpr, BC: tl.constexpr):
    """(I + L)^-1 of one matrix of four blocks, BT = 4 BC."""
    i_s = tl.program_id(0).to(tl.int64)
    p_l += i_s * BT * BT
    p_x += i_s * BT * BT
    b_x = inverse_of_diagonal(p_l, BT, BC)
    b_none = tl.zeros([BC, BT], dtype=tl.float32)
    b_x0 = block_rows(b_x, p_l, b_none, b_none, b_none, 0, BT, BC)
    b_x1 = block_rows(b_x, p_l, b_x0, b_none, b_none, 1, BT, BC)
    b_x2 = block_rows(b_x, p_l, b_x0, b_x1, b_none, 2, BT, BC)
    b_x3 = block_rows(b_x, p_l, b_x0, b_x1, b_x2, 3, BT, BC)
    store_block(p_x, b_x0, 0, BT, BC)
    store_block(p_x, b_x1, 1, BT, BC)
    store_block(p_x, b_x2, 2, BT, BC)
    store_block(p_x, b_x3, 3, BT, BC)


@triton.jit
def apply_kernel(
    p_x,
    p_y,
    p_weight,
    p_o,
    p_starts,
    p_stops,
    H: tl.constexpr,
    W: tl.constexpr,
    BT: tl.constexpr,
    BW: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    TURNED: tl.constexpr,
):
    """X (weight y), or X^T (weight y), of one chunk and BW columns of the rows y [tokens, H, W]."""
    i_c, i_w, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    b_x = load_square(p_x, i_c * H + i_h, BT)
    b_y = load_rows(p_y, i_h, start, stop, i_w, H, W, BT, BW)
    if TURNED:
        b_x = tl.trans(b_x)
    if HAS_WEIGHT:
        b_x = (b_x * load_scalars(p_weight, i_h, start, stop, H, BT)[None, :]).to(b_y.dtype)
    store_rows(p_o, tl.dot(b_x, b_y, input_precision="ieee"), i_h, start, stop, i_w, H, W, BT, BW)


def scan_tiles(q: Tensor, v: Tensor) -> dict[str, Any]:
    """Tiles of the kernels that walk the chunks: the whole of K, so that U is known at once, few rows and columns."""
    key, value = (triton.next_power_of_2(max(16, x.shape[-1])) for x in (q, v))
    size = 32 if q.element_size() <= 2 and key <= 128 else 16
    return {"K": q.shape[-1], "V": v.shape[-1], "BT": CHUNK, "BR": size, "BK": key, "BV": min(size, value)}


def invert(lower: Tensor, like: Tensor) -> Tensor:
    """(I + L)^-1 for L [chunks, H, C, C] in float32, in the dtype of ``like``."""
    inverse = lower.new_empty(lower.shape, dtype=like.dtype)
    inverse_kernel[(lower.shape[0] * lower.shape[1],)](lower, inverse, BT=CHUNK, BC=16, num_warps=WARPS["inverse"])
    return inverse


def apply_square(
    square: Tensor, y: Tensor, table: ChunkTable, weight: Tensor | None = None, turned: bool = False
) -> Tensor:
    """X (weight y), turned: X^T (weight y), for X [chunks, H, C, C]; y [B, T, H, W] contiguous, weight [B, T, H]."""
    heads, width = y.shape[2:]
    out = y.new_empty(y.shape)
    columns = min(64 if y.element_size() <= 2 else 32, max(16, triton.next_power_of_2(width)))
    grid = (table.chunks, triton.cdiv(width, columns), heads)
    apply_kernel[grid](
        square,
        y,
        y if weight is None else weight,
        out,
        *table.span,
        H=heads,
        W=width,
        BT=CHUNK,
        BW=columns,
        HAS_WEIGHT=weight is not None,
        TURNED=turned,
        num_warps=WARPS["apply"],
    )
    return out
