"""The delta rule with a decay per token and head on a GPU (the algebra is in ``chunked.py``).

A decay over K is left to ``triton_channel.py``.

Once U = Y - W S is known, outputs and the gradients of q, k, U and g are those of a scalar decay with the values U:
its ``output_kernel`` and ``gradients_kernel`` run here too. What is left, per chunk unless it says otherwise:

    lower_kernel      L = beta A_kk, and beta exp(G)      inverse_kernel  X = (I + L)^-1
    apply_kernel      W = X (beta exp(G) k), Y = X (beta v); in the backward dR = X^T dU
    states_kernel     the states and U, chunk after chunk
    local_kernel      A_qk^T do, what dU gets without a state
    adjoints_kernel   the gradients of the states, from the last chunk to the first
    solve_kernel      the gradients that reach k, v, g and beta through U
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mstc.kernels.common.outputs import empty_outputs
from mstc.kernels.common.segments import CHUNK
from mstc.kernels.common.tables import chunk_table, sequence_rows
from mstc.kernels.common.triton_blocks import load_rows, load_state, pick_tiles, store_rows, store_state
from mstc.kernels.common.triton_solve import WARPS as SOLVE_WARPS
from mstc.kernels.common.triton_solve import (
    apply_kernel,
    apply_square,
    inverse_kernel,
    invert,
    load_scalars,
    scan_tiles,
    store_square,
)
from mstc.kernels.delta_rule import triton_channel
from mstc.kernels.scalar_decay.triton import WARPS as SCALAR_WARPS
from mstc.kernels.scalar_decay.triton import gradients_kernel, load_sums, output_kernel, pair_decays

__all__ = [
    "STAGES",
    "WARPS",
    "adjoints_kernel",
    "apply_kernel",
    "backward",
    "forward",
    "inverse_kernel",
    "local_kernel",
    "lower_kernel",
    "solve_kernel",
    "states_kernel",
]

WARPS = {**SOLVE_WARPS, "lower": 4, "states": 8, "local": 8, "adjoints": 8, "solve": 8}
STAGES = 2
"""Pipeline stages: with 3, K = 256 in float32 does not fit sm_80 and gfx942."""


@triton.jit
def lower_kernel(
    p_k,
    p_beta,
    p_g,
    p_l,
    p_weight,
    p_starts,
    p_stops,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    HAS_G: tl.constexpr,
):
    """L_ij = beta_i (k_i . k_j) D_ij for j < i, and beta exp(G)."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    b_sum, _ = load_sums(p_g, i_h, start, stop, H, BT, HAS_G)
    b_beta = load_scalars(p_beta, i_h, start, stop, H, BT)
    b_l = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        b_k = load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK)
        b_l += tl.dot(b_k, tl.trans(b_k), input_precision="ieee")
    o_t = tl.arange(0, BT)
    below = o_t[:, None] > o_t[None, :]
    store_square(p_l, tl.where(below, b_l * pair_decays(b_sum, BT) * b_beta[:, None], 0.0), i_c * H + i_h, BT)
    b_weight = b_beta * tl.exp(b_sum.to(tl.float32))
    tl.store(p_weight + (start + o_t) * H + i_h, b_weight, mask=start + o_t < stop)


@triton.jit
def states_kernel(
    p_k,
    p_w,
    p_y,
    p_g,
    p_first_state,
    p_h,
    p_u,
    p_last_state,
    p_starts,
    p_stops,
    p_first,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """U = Y - W S; S <- exp(G_C) S + (exp(G_C - G) k)^T U over a sequence's chunks, for BV columns; BK >= K.

    p_h gets S as each chunk finds it. A chunk is read BR rows at a time.
    """
    i_nh, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    first, last = tl.load(p_first + i_n), tl.load(p_first + i_n + 1)
    b_h = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_STATE:
        b_h += load_state(p_first_state, i_nh, 0, i_v, K, V, BK, BV).to(tl.float32)
    for i_c in range(first, last):
        start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
        store_state(p_h, b_h, i_c * H + i_h, 0, i_v, K, V, BK, BV)
        b_s = b_h.to(p_k.dtype.element_ty)
        _, rest = load_sums(p_g, i_h, start, stop, H, BT, HAS_G)
        b_h *= tl.exp(rest.to(tl.float32))
        for i_r in range(BT // BR):
            row = start + i_r * BR
            b_w = load_rows(p_w, i_h, row, stop, 0, H, K, BR, BK)
            b_y = load_rows(p_y, i_h, row, stop, i_v, H, V, BR, BV)
            b_u = b_y - tl.dot(b_w, b_s, input_precision="ieee")
            store_rows(p_u, b_u, i_h, row, stop, i_v, H, V, BR, BV)
            b_sum, total = load_sums(p_g, i_h, row, stop, H, BR, HAS_G)
            b_k = load_rows(p_k, i_h, row, stop, 0, H, K, BR, BK)
            b_k = (b_k * tl.exp((rest - b_sum).to(tl.float32))[:, None]).to(b_s.dtype)
            b_h += tl.dot(tl.trans(b_k), b_u.to(b_s.dtype), input_precision="ieee")
            rest -= total
    store_state(p_last_state, b_h, i_nh, 0, i_v, K, V, BK, BV)


@triton.jit
def local_kernel(
    p_q,
    p_k,
    p_g,
    p_do,
    p_du,
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
    """scale (q k^T * D)^T do, one chunk and BV columns per program."""
    i_c, i_v, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    b_sum, _ = load_sums(p_g, i_h, start, stop, H, BT, HAS_G)
    b_a = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        b_q = load_rows(p_q, i_h, start, stop, i_k, H, K, BT, BK)
        b_k = load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK)
        b_a += tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    b_do = load_rows(p_do, i_h, start, stop, i_v, H, V, BT, BV)
    b_a = (b_a * pair_decays(b_sum, BT) * scale).to(b_do.dtype)
    b_du = tl.dot(tl.trans(b_a), b_do, input_precision="ieee")
    store_rows(p_du, b_du, i_h, start, stop, i_v, H, V, BT, BV)


@triton.jit
def adjoints_kernel(
    p_q,
    p_k,
    p_w,
    p_g,
    p_do,
    p_du,
    p_last_state,
    p_dh,
    p_first_state,
    p_starts,
    p_stops,
    p_first,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_G: tl.constexpr,
    HAS_STATE: tl.constexpr,
):
    """dU = local + (exp(G_C - G) k) E; E <- exp(G_C) E + (scale exp(G) q)^T do - W^T dU, last chunk first; BK >= K.

    p_dh gets E, the gradient of the state after each chunk; p_first_state that of the initial state.
    """
    i_nh, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    first, last = tl.load(p_first + i_n), tl.load(p_first + i_n + 1)
    b_dh = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_STATE:
        b_dh += load_state(p_last_state, i_nh, 0, i_v, K, V, BK, BV).to(tl.float32)
    for i in range(last - first):
        i_c = last - 1 - i
        start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
        store_state(p_dh, b_dh, i_c * H + i_h, 0, i_v, K, V, BK, BV)
        b_e = b_dh.to(p_k.dtype.element_ty)
        _, total = load_sums(p_g, i_h, start, stop, H, BT, HAS_G)
        b_dh *= tl.exp(total.to(tl.float32))
        rest = total
        for i_r in range(BT // BR):
            row = start + i_r * BR
            b_sum, part = load_sums(p_g, i_h, row, stop, H, BR, HAS_G)
            b_left = rest - b_sum
            b_k = load_rows(p_k, i_h, row, stop, 0, H, K, BR, BK)
            b_k = (b_k * tl.exp(b_left.to(tl.float32))[:, None]).to(b_e.dtype)
            b_du = load_rows(p_du, i_h, row, stop, i_v, H, V, BR, BV) + tl.dot(b_k, b_e, input_precision="ieee")
            b_w = load_rows(p_w, i_h, row, stop, 0, H, K, BR, BK)
            b_dh -= tl.dot(tl.trans(b_w), b_du.to(b_e.dtype), input_precision="ieee")
            b_q = load_rows(p_q, i_h, row, stop, 0, H, K, BR, BK)
            b_q = (b_q * (tl.exp((total - b_left).to(tl.float32)) * scale)[:, None]).to(b_e.dtype)
            b_do = load_rows(p_do, i_h, row, stop, i_v, H, V, BR, BV)
            b_dh += tl.dot(tl.trans(b_q), b_do, input_precision="ieee")
            rest -= part
    store_state(p_first_state, b_dh, i_nh, 0, i_v, K, V, BK, BV)


@triton.jit
def solve_kernel(
    p_k,
    p_v,
    p_g,
    p_beta,
    p_u,
    p_dr,
    p_h,
    p_dk,
    p_dv,
    p_dg,
    p_dbeta,
    p_starts,
    p_stops,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_G: tl.constexpr,
):
    """dv and dbeta of one chunk, and what dk and dg get through U, added to what p_dk and p_dg hold."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    i_s = i_c * H + i_h
    o_t = tl.arange(0, BT)
    before = o_t[:, None] > o_t[None, :]
    b_sum, _ = load_sums(p_g, i_h, start, stop, H, BT, HAS_G)
    b_start = tl.exp(b_sum.to(tl.float32))
    b_beta = load_scalars(p_beta, i_h, start, stop, H, BT)
    b_da = tl.zeros([BT, BT], dtype=tl.float32)
    b_dbeta = tl.zeros([BT], dtype=tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        b_dr = load_rows(p_dr, i_h, start, stop, i_v, H, V, BT, BV)
        b_u = load_rows(p_u, i_h, start, stop, i_v, H, V, BT, BV)
        b_da -= tl.dot(b_dr, tl.trans(b_u), input_precision="ieee")
        b_read = tl.zeros([BT, BV], dtype=tl.float32)
        for i_k in range(tl.cdiv(K, BK)):
            b_k = load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK)
            b_h = load_state(p_h, i_s, i_k, i_v, K, V, BK, BV)
            b_read += tl.dot(b_k, b_h, input_precision="ieee")
        b_v = load_rows(p_v, i_h, start, stop, i_v, H, V, BT, BV)
        b_dbeta += tl.sum(b_dr * (b_v - b_read * b_start[:, None]), 1)
        store_rows(p_dv, b_dr * b_beta[:, None], i_h, start, stop, i_v, H, V, BT, BV)
    b_a = tl.zeros([BT, BT], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        b_k = load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK)
        b_a += tl.dot(b_k, tl.trans(b_k), input_precision="ieee")
    b_da = tl.where(before, b_da * pair_decays(b_sum, BT), 0.0)
    b_p = b_a * b_da
    b_dbeta += tl.sum(b_p, 1)
    b_p *= b_beta[:, None]
    b_da *= b_beta[:, None]
    b_da += tl.trans(b_da)
    b_later = tl.zeros([BT], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        b_dk = tl.zeros([BT, BK], dtype=tl.float32)
        for i_v in range(tl.cdiv(V, BV)):
            b_dr = load_rows(p_dr, i_h, start, stop, i_v, H, V, BT, BV)
            b_h = load_state(p_h, i_s, i_k, i_v, K, V, BK, BV)
            b_dk -= tl.dot(b_dr, tl.trans(b_h), input_precision="ieee")
        b_k = load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK)
        b_dk *= (b_beta * b_start)[:, None]
        b_later += tl.sum(b_k * b_dk, 1)
        b_dk += tl.dot(b_da.to(b_k.dtype), b_k, input_precision="ieee")
        b_dk += load_rows(p_dk, i_h, start, stop, i_k, H, K, BT, BK)
        store_rows(p_dk, b_dk, i_h, start, stop, i_k, H, K, BT, BK)
    mask = start + o_t < stop
    at = (start + o_t) * H + i_h
    tl.store(p_dbeta + at, b_dbeta.to(p_dbeta.dtype.element_ty), mask=mask)
    if HAS_G:
        b_dg = tl.sum(tl.where(before, tl.cumsum(b_p, 0, reverse=True), 0.0), 1)
        b_dg += tl.sum(tl.where(before, 0.0, tl.trans(tl.broadcast_to(b_later[:, None], [BT, BT]))), 1)
        b_dg += tl.load(p_dg + at, mask=mask, other=0.0)
        tl.store(p_dg + at, b_dg.to(p_dg.dtype.element_ty), mask=mask)


class _Pass:
    """What forward and backward share: contiguous operands, the table of chunks, X, W and the states."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, beta: Tensor, cu_seqlens: Tensor | None
    ) -> None:
        self.q, self.k, self.v, self.beta = q.contiguous(), k.contiguous(), v.contiguous(), beta.contiguous()
        self.decay = None if decay is None else decay.contiguous()
        self.gate = self.q if self.decay is None else self.decay
        self.table = chunk_table(q.shape[0], q.shape[1], cu_seqlens, q.device)
        self.slots = self.table.slots, sequence_rows(self.table, cu_seqlens)
        self.heads = q.shape[2]
        self.tiles, self.scan_tiles = pick_tiles(q, v), scan_tiles(q, v)

    def given(self, kernel: str, tiles: dict[str, Any], **constants: bool) -> dict[str, Any]:
        """The constants of a kernel of this file."""
        shared = {"HAS_G": self.decay is not None, "num_warps": WARPS[kernel], "num_stages": STAGES}
        return {"H": self.heads, **tiles, **shared, **constants}

    def solve(self) -> None:
        """X, W and Y."""
        lower = self.q.new_empty((self.table.chunks, self.heads, CHUNK, CHUNK), dtype=torch.float32)
        weight = torch.empty_like(self.beta, dtype=torch.float32)
        lower_kernel[(self.table.chunks, self.heads)](
            self.k,
            self.beta,
            self.gate,
            lower,
            weight,
            *self.table.span,
            **self.given("lower", {"K": self.tiles["K"], "BT": CHUNK, "BK": self.tiles["BK"]}),
        )
        self.inverse = invert(lower, self.q)
        self.w = apply_square(self.inverse, self.k, self.table, weight)
        self.y = apply_square(self.inverse, self.v, self.table, self.beta)

    def scan(self, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(states [chunks, H, K, V] as each chunk finds them, U [B, T, H, V], the last ones [N, H, K, V])."""
        states, last = self.empty_states()
        u = torch.empty_like(self.v)
        states_kernel[self.scan_grid()](
            self.k,
            self.w,
            self.y,
            self.gate,
            self.q if initial_state is None else initial_state,
            states,
            u,
            last,
            *self.table.span,
            self.table.first,
            **self.given("states", self.scan_tiles, HAS_STATE=initial_state is not None),
        )
        return states, u, last

    def adjoints(self, do: Tensor, grad_final: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        """(gradients of the states [chunks, H, K, V] that each chunk leaves, of the initial ones [N, H, K, V])."""
        local = torch.empty_like(self.v)
        columns = triton.cdiv(self.tiles["V"], self.tiles["BV"])
        local_kernel[(self.table.chunks, columns, self.heads)](
            self.q,
            self.k,
            self.gate,
            do,
            local,
            *self.table.span,
            scale,
            **self.given("local", self.tiles),
        )
        grad_states, grad_initial = self.empty_states()
        adjoints_kernel[self.scan_grid()](
            self.q,
            self.k,
            self.w,
            self.gate,
            do,
            local,
            self.q if grad_final is None else grad_final.contiguous(),
            grad_states,
            grad_initial,
            *self.table.span,
            self.table.first,
            scale,
            **self.given("adjoints", self.scan_tiles, HAS_STATE=grad_final is not None),
        )
        return grad_states, grad_initial

    def empty_states(self) -> tuple[Tensor, Tensor]:
        """States of every chunk, in the inputs' dtype, and of every sequence, in float32."""
        shape = (self.heads, self.tiles["K"], self.tiles["V"])
        chunks = self.q.new_empty((self.table.chunks, *shape))
        return chunks, self.q.new_empty((self.table.sequences, *shape), dtype=torch.float32)

    def scan_grid(self) -> tuple[int, int]:
        return self.table.sequences * self.heads, triton.cdiv(self.tiles["V"], self.scan_tiles["BV"])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final states, kept states); of the kept states only each sequence's first is filled."""
    if decay is not None and decay.dim() == q.dim():
        return triton_channel.forward(q, k, v, decay, beta, initial_state, cu_seqlens, scale)
    out, _, kept = empty_outputs(q, v, cu_seqlens)
    run = _Pass(q, k, v, decay, beta, cu_seqlens)
    run.solve()
    states, u, final = run.scan(None if initial_state is None else initial_state.contiguous())
    kept.zero_()
    if initial_state is not None:
        kept[run.slots] = initial_state.to(kept.dtype)
    columns = triton.cdiv(run.tiles["V"], run.tiles["BV"])
    output_kernel[(run.table.chunks, columns, run.heads)](
        run.q,
        run.k,
        u,
        run.gate,
        states,
        out,
        *run.table.span,
        scale,
        H=run.heads,
        **run.tiles,
        HAS_G=decay is not None,
        num_warps=SCALAR_WARPS["output"],
    )
    return out, final, kept


def backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, decay (empty without one), beta and the initial states."""
    if decay is not None and decay.dim() == q.dim():
        return triton_channel.backward(grad_out, grad_final, q, k, v, decay, beta, kept, cu_seqlens, scale)
    run = _Pass(q, k, v, decay, beta, cu_seqlens)
    run.solve()
    states, u, _ = run.scan(kept[run.slots])
    do = grad_out.contiguous()
    grad_states, grad_initial = run.adjoints(do, grad_final, scale)
    dq, dk, du, dv = (torch.empty_like(x) for x in (run.q, run.k, run.v, run.v))
    dg = q.new_empty(0) if run.decay is None else torch.empty_like(run.decay)
    grid = (run.table.chunks, run.heads)
    gradients_kernel[grid](
        run.q,
        run.k,
        u,
        run.gate,
        do,
        states,
        grad_states,
        dq,
        dk,
        du,
        dg,
        *run.table.span,
        scale,
        H=run.heads,
        **run.tiles,
        HAS_G=decay is not None,
        num_warps=SCALAR_WARPS["gradients"],
    )
    dr = apply_square(run.inverse, du, run.table, turned=True)
    dbeta = torch.empty_like(run.beta)
    solve_kernel[grid](
        run.k,
        run.v,
        run.gate,
        run.beta,
        u,
        dr,
        states,
        dk,
        dv,
        dg,
        dbeta,
        *run.table.span,
        **run.given("solve", run.tiles),
    )
    return dq, dk, dv, dg, dbeta, grad_initial
