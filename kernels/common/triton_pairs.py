"""Pairs of tokens under a decay per channel on a GPU (``vector_pairs.py`` has the algebra, for the CPU).

    A_ij = sum_k q_ik k_jk exp(L_ijk)   for j <= i,   L_ij = g_{j+1} + .. + g_i

With a bonus u, a left sees the state before its own decay: L_ij = g_{j+1} + .. + g_{i-1}, and A_ii = q_i (u k_i).
A program has a sub-block of BC tokens, first .. last, of a chunk of BT. Pairs inside it are formed element by
element, with L by adding decays. Pairs across its edge split there, exp(g_first + .. + g_i) exp(g_{j+1} + ..
+ g_{first-1}), and are matrix products. No exponent is positive, and no sum is a difference of sums.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from mstc.kernels.common.triton_blocks import load_state, store_rows, store_state

__all__ = [
    "SUB_CHUNK",
    "load_span",
    "pair_gradients_kernel",
    "pairs_kernel",
    "prefix_sums",
    "shift_down",
    "suffix_sums",
]

SUB_CHUNK = 16
"""The smallest edge of a matrix product in Triton."""


@triton.jit
def load_span(p_x, i_h, row, low, high, i_w, H: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """Rows row .. row + BT of [tokens, H, W], columns of block i_w: [BT, BW] in float32, zero outside low .. high."""
    o_t = row + tl.arange(0, BT)
    o_w = i_w * BW + tl.arange(0, BW)
    mask = ((o_t >= low) & (o_t < high))[:, None] & (o_w < W)[None, :]
    return tl.load(p_x + (o_t[:, None] * H + i_h) * W + o_w[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_bonus(p_u, i_h, i_k, K: tl.constexpr, BK: tl.constexpr):
    """Columns of block i_k of row i_h of [H, K]: [BK] in float32."""
    o_k = i_k * BK + tl.arange(0, BK)
    return tl.load(p_u + i_h * K + o_k, mask=o_k < K, other=0.0).to(tl.float32)


@triton.jit
def prefix_sums(
    p_g, i_h, row, high, i_w, H: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr, BEFORE: tl.constexpr
):
    """g_row + .. + g_i of [tokens, H, W], of decays before ``high``; BEFORE: .. + g_{i-1}."""
    if BEFORE:
        b_g = load_span(p_g, i_h, row - 1, row, high, i_w, H, W, BT, BW)
    else:
        b_g = load_span(p_g, i_h, row, row, high, i_w, H, W, BT, BW)
    return tl.cumsum(b_g, 0)


@triton.jit
def suffix_sums(p_g, i_h, row, high, i_w, H: tl.constexpr, W: tl.constexpr, BT: tl.constexpr, BW: tl.constexpr):
    """g_{i+1} + .. + g_{high-1}, for i from ``row`` on."""
    return tl.cumsum(load_span(p_g, i_h, row + 1, row, high, i_w, H, W, BT, BW), 0, reverse=True)


@triton.jit
def shift_down(b_x, BT: tl.constexpr, BW: tl.constexpr):
    """y_t = x_{t-1}, y_0 = 0, of [BT, BW]: makes a sum exclusive without subtracting."""
    o_t = tl.arange(0, BT)
    source = tl.broadcast_to(tl.maximum(o_t - 1, 0)[:, None], [BT, BW])
    return tl.where((o_t > 0)[:, None], tl.gather(b_x, source, 0), 0.0)


@triton.jit
def later_sums(b_x, BT: tl.constexpr, BW: tl.constexpr, AFTER: tl.constexpr):
    """y_t = sum of x_i over i >= t of [BT, BW]; AFTER: over i > t."""
    b_y = tl.cumsum(b_x, 0, reverse=True)
    if AFTER:
        o_t = tl.arange(0, BT)
        source = tl.broadcast_to(tl.minimum(o_t + 1, BT - 1)[:, None], [BT, BW])
        b_y = tl.where((o_t < BT - 1)[:, None], tl.gather(b_y, source, 0), 0.0)
    return b_y


@triton.jit
def inner_decays(
    p_g,
    p_u,
    i_h,
    first,
    last,
    i_k,
    H: tl.constexpr,
    K: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    HAS_U: tl.constexpr,
):
    """What weighs q_i k_j inside a sub-block, [BC, BC, BK]: exp(L_ij) below the diagonal, 1 or u on it, 0 above."""
    o_i = tl.arange(0, BC)[:, None, None]
    o_j = tl.arange(0, BC)[None, :, None]
    b_next = load_span(p_g, i_h, first + 1, first, last, i_k, H, K, BC, BK)
    b_l = tl.where(o_j + (1 if HAS_U else 0) < o_i, tl.broadcast_to(b_next[None, :, :], [BC, BC, BK]), 0.0)
    b_e = tl.where(o_j <= o_i, tl.exp(tl.cumsum(b_l, 1, reverse=True)), 0.0)
    if HAS_U:
        b_u = load_bonus(p_u, i_h, i_k, K, BK)
        b_e = tl.where(o_j == o_i, tl.broadcast_to(b_u[None, None, :], [BC, BC, BK]), b_e)
    return b_e


@triton.jit
def pairs_kernel(
    p_q,
    p_k,
    p_g,
    p_u,
    p_a,
    p_starts,
    p_stops,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    HAS_U: tl.constexpr,
):
    """scale A, [chunks, H, BT, BT]: the rows of one sub-block per program, zero above the diagonal."""
    i_m, i_c = tl.program_id(0) % (BT // BC), (tl.program_id(0) // (BT // BC)).to(tl.int64)
    i_h = tl.program_id(1)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    first = tl.minimum(start + i_m * BC, stop)
    last = tl.minimum(first + BC, stop)
    b_inside = tl.zeros([BC, BC], dtype=tl.float32)
    b_before = tl.zeros([BC, BT], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        b_q = load_span(p_q, i_h, first, first, last, i_k, H, K, BC, BK)
        b_k = load_span(p_k, i_h, first, first, last, i_k, H, K, BC, BK)
        b_e = inner_decays(p_g, p_u, i_h, first, last, i_k, H, K, BC, BK, HAS_U)
        b_inside += tl.sum(b_q[:, None, :] * b_k[None, :, :] * b_e, 2)
        b_q *= tl.exp(prefix_sums(p_g, i_h, first, last, i_k, H, K, BC, BK, HAS_U))
        b_k = load_span(p_k, i_h, start, start, first, i_k, H, K, BT, BK)
        b_k *= tl.exp(suffix_sums(p_g, i_h, start, first, i_k, H, K, BT, BK))
        dtype = p_k.dtype.element_ty
        b_before += tl.dot(b_q.to(dtype), tl.trans(b_k).to(dtype), input_precision="ieee")
    o_i, o_j = i_m * BC + tl.arange(0, BC), tl.arange(0, BT)
    p_row = p_a + ((i_c * H + i_h) * BT + o_i[:, None]) * BT + o_j[None, :]
    elsewhere = (o_j < i_m * BC) | (o_j >= (i_m + 1) * BC)
    tl.store(p_row, (b_before * scale).to(p_a.dtype.element_ty), mask=tl.broadcast_to(elsewhere[None, :], [BC, BT]))
    store_state(p_a, b_inside * scale, i_c * H + i_h, i_m, i_m, BT, BT, BC, BC)


@triton.jit
def pair_gradients_kernel(
    p_q,
    p_k,
    p_g,
    p_u,
    p_da,
    p_dq,
    p_dk,
    p_dg,
    p_du,
    p_starts,
    p_stops,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,
    HAS_U: tl.constexpr,
):
    """What dA [chunks, H, BT, BT] gives to q, k, g and u (p_du: [chunks BT / BC, H, K], to be summed).

    dg_t adds the pairs j < t <= i (with a bonus t < i): inside the sub-block, from before it, from after it, across.
    """
    i_m, i_c = tl.program_id(0) % (BT // BC), (tl.program_id(0) // (BT // BC)).to(tl.int64)
    i_k, i_h = tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    first = tl.minimum(start + i_m * BC, stop)
    last = tl.minimum(first + BC, stop)
    i_s = i_c * H + i_h
    dtype = p_k.dtype.element_ty
    b_q = load_span(p_q, i_h, first, first, last, i_k, H, K, BC, BK)
    b_k = load_span(p_k, i_h, first, first, last, i_k, H, K, BC, BK)

    # Inside: the pairs summed over j < t, then over i >= t, stand one row too high.
    o_i, o_j = tl.arange(0, BC)[:, None, None], tl.arange(0, BC)[None, :, None]
    b_w = inner_decays(p_g, p_u, i_h, first, last, i_k, H, K, BC, BK, HAS_U)
    b_w *= load_state(p_da, i_s, i_m, i_m, BT, BT, BC, BC).to(tl.float32)[:, :, None]
    b_dq = tl.sum(b_w * b_k[None, :, :], 1)
    b_dk = tl.sum(b_w * b_q[:, None, :], 0)
    b_w *= b_q[:, None, :] * b_k[None, :, :]
    if HAS_U:
        o_k = i_k * BK + tl.arange(0, BK)
        b_a = load_state(p_da, i_s, i_m, i_m, BT, BT, BC, BC).to(tl.float32)
        o_t = tl.arange(0, BC)
        b_a = tl.sum(tl.where(o_t[:, None] == o_t[None, :], b_a, 0.0), 1)
        p_row = p_du + (tl.program_id(0).to(tl.int64) * H + i_h) * K
        tl.store(p_row + o_k, tl.sum(b_a[:, None] * b_q * b_k, 0), mask=o_k < K)
    b_w = tl.cumsum(tl.where(o_j < o_i, b_w, 0.0), 1)
    b_dg = shift_down(tl.sum(tl.where(o_j + (1 if HAS_U else 0) < o_i, b_w, 0.0), 0), BC, BK)

    # From before: tokens start .. first of the chunk, decayed up to the edge.
    b_right = load_span(p_k, i_h, start, start, first, i_k, H, K, BT, BK)
    b_right = (b_right * tl.exp(suffix_sums(p_g, i_h, start, first, i_k, H, K, BT, BK))).to(dtype)
    b_a = load_state(p_da, i_s, i_m, 0, BT, BT, BC, BT).to(dtype)
    b_part = tl.dot(b_a, b_right, input_precision="ieee")
    b_part *= tl.exp(prefix_sums(p_g, i_h, first, last, i_k, H, K, BC, BK, HAS_U))
    b_dq += b_part
    b_dg += later_sums(b_q * b_part, BC, BK, HAS_U)

    # From after: tokens last .. stop, decayed from the edge on.
    b_left = load_span(p_q, i_h, start, last, stop, i_k, H, K, BT, BK)
    if HAS_U:
        b_sum = tl.cumsum(load_span(p_g, i_h, start - 1, last, stop, i_k, H, K, BT, BK), 0)
    else:
        b_sum = tl.cumsum(load_span(p_g, i_h, start, last, stop, i_k, H, K, BT, BK), 0)
    b_left *= tl.exp(b_sum)
    b_a = tl.trans(load_state(p_da, i_s, 0, i_m, BT, BT, BT, BC)).to(dtype)
    b_part = tl.dot(b_a, b_left.to(dtype), input_precision="ieee")
    b_part *= tl.exp(suffix_sums(p_g, i_h, first, last, i_k, H, K, BC, BK))
    b_dk += b_part
    b_dg += shift_down(tl.cumsum(b_k * b_part, 0), BC, BK)

    # Across: j before the sub-block, i after it.
    b_a = load_state(p_da, i_s, 0, 0, BT, BT, BT, BT).to(dtype)
    b_across = tl.sum(b_left * tl.dot(b_a, b_right, input_precision="ieee"), 0)
    b_total = tl.sum(load_span(p_g, i_h, first, first, last, i_k, H, K, BC, BK), 0)
    b_dg += (b_across * tl.exp(b_total))[None, :]
    store_rows(p_dq, b_dq, i_h, first, last, i_k, H, K, BC, BK)
    store_rows(p_dk, b_dk, i_h, first, last, i_k, H, K, BC, BK)
    store_rows(p_dg, b_dg, i_h, first, last, i_k, H, K, BC, BK)
