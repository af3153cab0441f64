"""A diagonal plus rank one transition on a GPU (the algebra is in ``chunked.py``).

    pairs_kernel            A_qk, A_qb, A_ak and A_ab, a sub-block of 16 rows per program (``common/triton_pairs.py``)
    inverse_kernel          X = (I - A_ab)^-1
    rows_kernel             p q, p' a, e k, e b, and p_C
    apply_kernel            W = X (p' a), Y = X (A_ak V); in the backward A_qb^T do and dZ = X^T dU
    walk_kernel             the states and U, chunk after chunk; in reverse their gradients and dU
    mix_kernel              o = A_qk V + A_qb U + (p q) S; in the backward dV = A_qk^T do + A_ak^T dZ + (e k) E

o and Z, the right side of U's equation, are outputs of linear attention with a decay over K, for the queries q and
a, the keys k and b and the values V and U. That class's kernels give their gradients, a query and a key at a time.
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
from mstc.kernels.common.triton_pairs import (
    SUB_CHUNK,
    load_span,
    pair_gradients_kernel,
    pairs_kernel,
    prefix_sums,
    suffix_sums,
)
from mstc.kernels.common.triton_solve import apply_square, invert, load_square, scan_tiles
from mstc.kernels.vector_decay.triton import PAIR_TILE, gradients_kernel, scores_kernel
from mstc.kernels.vector_decay.triton import WARPS as VECTOR_WARPS

__all__ = ["STAGES", "WARPS", "backward", "forward", "mix_kernel", "rows_kernel", "walk_kernel"]

WARPS = {"rows": 8, "walk": 8, "mix": 8}
STAGES = 2
"""Pipeline stages, as in ``delta_rule/triton.py``."""


@triton.jit
def rows_kernel(
    p_q,
    p_k,
    p_a,
    p_b,
    p_g,
    p_q_start,
    p_k_end,
    p_a_start,
    p_b_end,
    p_last,
    p_starts,
    p_stops,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
):
    """scale p q, e k, p' a, e b of one chunk and BK columns, and p_C [chunks, H, K]."""
    i_c, i_k, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    b_w = tl.exp(prefix_sums(p_g, i_h, start, stop, i_k, H, K, BT, BK, False)) * scale
    b_x = load_rows(p_q, i_h, start, stop, i_k, H, K, BT, BK)
    store_rows(p_q_start, b_x * b_w, i_h, start, stop, i_k, H, K, BT, BK)
    b_w = tl.exp(prefix_sums(p_g, i_h, start, stop, i_k, H, K, BT, BK, True))
    b_x = load_rows(p_a, i_h, start, stop, i_k, H, K, BT, BK)
    store_rows(p_a_start, b_x * b_w, i_h, start, stop, i_k, H, K, BT, BK)
    b_w = tl.exp(suffix_sums(p_g, i_h, start, stop, i_k, H, K, BT, BK))
    b_x = load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK)
    store_rows(p_k_end, b_x * b_w, i_h, start, stop, i_k, H, K, BT, BK)
    b_x = load_rows(p_b, i_h, start, stop, i_k, H, K, BT, BK)
    store_rows(p_b_end, b_x * b_w, i_h, start, stop, i_k, H, K, BT, BK)
    b_last = tl.exp(tl.sum(load_span(p_g, i_h, start, start, stop, i_k, H, K, BT, BK), 0))
    o_k = i_k * BK + tl.arange(0, BK)
    tl.store(p_last + (i_c * H + i_h) * K + o_k, b_last, mask=o_k < K)


@triton.jit
def walk_kernel(
    p_read,
    p_y,
    p_x,
    p_z,
    p_write,
    p_last,
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
    HAS_STATE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """U = Y + read S; S <- diag(p_C) S + x^T z + write^T U over a sequence's chunks, for BV columns; BK >= K.

    Forward: read = W, x = e k, z = V, write = e b. Reverse: Y = A_qb^T do, read = e b, x = p q, z = do, write = W, so
    that S is the gradient E, and U is dU. p_h gets S as each chunk finds it. A chunk is read BR rows at a time.
    """
    i_nh, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i_n, i_h = i_nh // H, i_nh % H
    head, end = tl.load(p_first + i_n), tl.load(p_first + i_n + 1)
    o_k = tl.arange(0, BK)
    b_h = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_STATE:
        b_h += load_state(p_first_state, i_nh, 0, i_v, K, V, BK, BV).to(tl.float32)
    for i in range(end - head):
        i_c = head + i
        if REVERSE:
            i_c = end - 1 - i
        start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
        store_state(p_h, b_h, i_c * H + i_h, 0, i_v, K, V, BK, BV)
        b_s = b_h.to(p_x.dtype.element_ty)
        b_h *= tl.load(p_last + (i_c * H + i_h) * K + o_k, mask=o_k < K, other=0.0)[:, None]
        for i_r in range(BT // BR):
            row = start + i_r * BR
            b_r = load_rows(p_read, i_h, row, stop, 0, H, K, BR, BK)
            b_u = load_rows(p_y, i_h, row, stop, i_v, H, V, BR, BV) + tl.dot(b_r, b_s, input_precision="ieee")
            store_rows(p_u, b_u, i_h, row, stop, i_v, H, V, BR, BV)
            b_w = load_rows(p_write, i_h, row, stop, 0, H, K, BR, BK)
            b_h += tl.dot(tl.trans(b_w), b_u.to(b_s.dtype), input_precision="ieee")
            b_x = load_rows(p_x, i_h, row, stop, 0, H, K, BR, BK)
            b_z = load_rows(p_z, i_h, row, stop, i_v, H, V, BR, BV)
            b_h += tl.dot(tl.trans(b_x), b_z, input_precision="ieee")
    store_state(p_last_state, b_h, i_nh, 0, i_v, K, V, BK, BV)


@triton.jit
def mix_kernel(
    p_a1,
    p_y1,
    p_a2,
    p_y2,
    p_x,
    p_h,
    p_o,
    p_starts,
    p_stops,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TURNED: tl.constexpr,
):
    """A1 y1 + A2 y2 + x S, turned: A1^T y1 + A2^T y2 + x S, one chunk and BV columns per program."""
    i_c, i_v, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    i_s = i_c * H + i_h
    b_o = tl.zeros([BT, BV], dtype=tl.float32)
    for i_k in range(tl.cdiv(K, BK)):
        b_x = load_rows(p_x, i_h, start, stop, i_k, H, K, BT, BK)
        b_h = load_state(p_h, i_s, i_k, i_v, K, V, BK, BV)
        b_o += tl.dot(b_x, b_h, input_precision="ieee")
    b_a1, b_a2 = load_square(p_a1, i_s, BT), load_square(p_a2, i_s, BT)
    if TURNED:
        b_a1, b_a2 = tl.trans(b_a1), tl.trans(b_a2)
    b_o += tl.dot(b_a1, load_rows(p_y1, i_h, start, stop, i_v, H, V, BT, BV), input_precision="ieee")
    b_o += tl.dot(b_a2, load_rows(p_y2, i_h, start, stop, i_v, H, V, BT, BV), input_precision="ieee")
    store_rows(p_o, b_o, i_h, start, stop, i_v, H, V, BT, BV)


class _Pass:
    """What forward and backward share: contiguous operands, the table of chunks, the pairs, X, W, Y and the states."""

    def __init__(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor],
        cu_seqlens: Tensor | None,
        scale: float,
    ) -> None:
        self.q, self.k, self.v, self.a, self.b, self.decay = (x.contiguous() for x in operands)
        self.scale = scale
        self.table = chunk_table(self.q.shape[0], self.q.shape[1], cu_seqlens, self.q.device)
        self.slots = self.table.slots, sequence_rows(self.table, cu_seqlens)
        self.heads = self.q.shape[2]
        self.tiles = pick_tiles(self.q, self.v)
        self.no_bonus = self.q.new_zeros((self.heads, self.tiles["K"]))
        sub_blocks = CHUNK // SUB_CHUNK
        self.pair_sizes = {"H": self.heads, "K": self.tiles["K"], "BT": CHUNK, "BC": SUB_CHUNK, "BK": PAIR_TILE}
        self.pair_programs = self.table.chunks * sub_blocks
        self.keys, self.columns = (triton.cdiv(self.tiles[w], self.tiles[f"B{w}"]) for w in "KV")

    def prepare(self) -> None:
        """The pairs, the decayed rows, X, W and Y."""
        dtype = self.q.dtype
        self.a_qk = self.pairs(self.q, self.k, self.scale, False, dtype)
        self.a_qb = self.pairs(self.q, self.b, self.scale, False, dtype)
        self.a_ak = self.pairs(self.a, self.k, 1.0, True, dtype)
        self.inverse = invert(self.pairs(self.a, self.b, -1.0, True, torch.float32), self.q)
        self.q_start, self.k_end, self.a_start, self.b_end = (torch.empty_like(self.q) for _ in range(4))
        self.last = self.q.new_empty((self.table.chunks, self.heads, self.tiles["K"]), dtype=torch.float32)
        rows_kernel[(self.table.chunks, self.keys, self.heads)](
            self.q,
            self.k,
            self.a,
            self.b,
            self.decay,
            self.q_start,
            self.k_end,
            self.a_start,
            self.b_end,
            self.last,
            *self.table.span,
            self.scale,
            H=self.heads,
            K=self.tiles["K"],
            BT=CHUNK,
            BK=self.tiles["BK"],
            num_warps=WARPS["rows"],
        )
        self.w = apply_square(self.inverse, self.a_start, self.table)
        self.y = apply_square(self.inverse, apply_square(self.a_ak, self.v, self.table), self.table)

    def pairs(self, left: Tensor, right: Tensor, scale: float, exclusive: bool, dtype: torch.dtype) -> Tensor:
        """scale A of every chunk; exclusive: a left that sees the state before its own decay, and not its own right."""
        found = self.q.new_empty((self.table.chunks, self.heads, CHUNK, CHUNK), dtype=dtype)
        pairs_kernel[(self.pair_programs, self.heads)](
            left,
            right,
            self.decay,
            self.no_bonus,
            found,
            *self.table.span,
            scale,
            **self.pair_sizes,
            HAS_U=exclusive,
            num_warps=VECTOR_WARPS["pairs"],
        )
        return found

    def walk(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
        first_state: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(states [chunks, H, K, V] as each chunk finds them, U [B, T, H, V], the last ones [N, H, K, V])."""
        tiles = scan_tiles(self.q, self.v)
        shape = (self.heads, tiles["K"], tiles["V"])
        states, u = self.q.new_empty((self.table.chunks, *shape)), torch.empty_like(self.v)
        last_state = self.q.new_empty((self.table.sequences, *shape), dtype=torch.float32)
        walk_kernel[(self.table.sequences * self.heads, triton.cdiv(tiles["V"], tiles["BV"]))](
            *operands,
            self.last,
            last_state if first_state is None else first_state.contiguous(),
            states,
            u,
            last_state,
            *self.table.span,
            self.table.first,
            H=self.heads,
            **tiles,
            HAS_STATE=first_state is not None,
            REVERSE=reverse,
            num_warps=WARPS["walk"],
            num_stages=STAGES,
        )
        return states, u, last_state

    def states(self, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The states as each chunk finds them, U, and the final ones."""
        return self.walk((self.w, self.y, self.k_end, self.v, self.b_end), initial_state, False)

    def mix(self, a1: Tensor, y1: Tensor, a2: Tensor, y2: Tensor, x: Tensor, states: Tensor, turned: bool) -> Tensor:
        """See ``mix_kernel``."""
        out = torch.empty_like(self.v)
        mix_kernel[(self.table.chunks, self.columns, self.heads)](
            a1,
            y1,
            a2,
            y2,
            x,
            states,
            out,
            *self.table.span,
            H=self.heads,
            **self.tiles,
            TURNED=turned,
            num_warps=WARPS["mix"],
            num_stages=STAGES,
        )
        return out

    def add_pair_gradients(
        self,
        totals: tuple[Tensor, Tensor, Tensor],
        left: Tensor,
        right: Tensor,
        do: Tensor,
        value: Tensor,
        scale: float,
        exclusive: bool,
    ) -> None:
        """Add what dA = scale do v^T gives to the left, the right and the decay, in float32."""
        scores = self.q.new_empty((self.table.chunks, self.heads, CHUNK, CHUNK), dtype=torch.float32)
        sizes: dict[str, Any] = {name: self.tiles[name] for name in ("V", "BT", "BV")}
        scores_kernel[(self.table.chunks, self.heads)](
            do, value, scores, *self.table.span, scale, H=self.heads, **sizes, num_warps=VECTOR_WARPS["scores"]
        )
        grads = [torch.empty_like(total) for total in totals]
        unused = self.q.new_empty((self.pair_programs if exclusive else 0, *self.no_bonus.shape), dtype=torch.float32)
        pair_gradients_kernel[(self.pair_programs, triton.cdiv(self.tiles["K"], PAIR_TILE), self.heads)](
            left,
            right,
            self.decay,
            self.no_bonus,
            scores,
            *grads,
            unused,
            *self.table.span,
            **self.pair_sizes,
            HAS_U=exclusive,
            num_warps=VECTOR_WARPS["pair_gradients"],
        )
        for total, grad in zip(totals, grads, strict=True):
            total += grad

    def gradients(
        self,
        operands: tuple[Tensor, Tensor, Tensor, Tensor],
        states: tuple[Tensor, Tensor],
        pair_grads: tuple[Tensor, Tensor, Tensor],
        decay_dtype: torch.dtype,
        scale: float,
        exclusive: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of left, right and decay from (left, right, value, do) and (S, E), pairs' gradients added."""
        left, right, value, do = operands
        dleft, dright = torch.empty_like(left), torch.empty_like(right)
        dg = torch.empty_like(self.decay, dtype=decay_dtype)
        gradients_kernel[(self.table.chunks, self.keys, self.heads)](
            left,
            right,
            value,
            self.decay,
            do,
            *states,
            *pair_grads,
            dleft,
            dright,
            dg,
            *self.table.span,
            scale,
            H=self.heads,
            **self.tiles,
            HAS_U=exclusive,
            HAS_LAST=not exclusive,
            num_warps=VECTOR_WARPS["gradients"],
        )
        return dleft, dright, dg


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final states, kept states); of the kept states only each sequence's first is filled."""
    _, _, kept = empty_outputs(q, v, cu_seqlens)
    run = _Pass((q, k, v, a, b, decay), cu_seqlens, scale)
    run.prepare()
    states, u, final = run.states(initial_state)
    kept.zero_()
    if initial_state is not None:
        kept[run.slots] = initial_state.to(kept.dtype)
    return run.mix(run.a_qk, run.v, run.a_qb, u, run.q_start, states, False), final, kept


def backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, a, b, decay and the initial states."""
    run, do = _Pass((q, k, v, a, b, decay), cu_seqlens, scale), grad_out.contiguous()
    run.prepare()
    before, u, _ = run.states(kept[run.slots])
    local = apply_square(run.a_qb, do, run.table, turned=True)
    after, du, grad_initial = run.walk((run.b_end, local, run.q_start, do, run.w), grad_final, True)
    dz = apply_square(run.inverse, du, run.table, turned=True)
    dv = run.mix(run.a_qk, do, run.a_ak, dz, run.k_end, after, True)
    dq, dk, da, db, dg = (torch.zeros_like(run.q, dtype=torch.float32) for _ in range(5))
    run.add_pair_gradients((dq, dk, dg), run.q, run.k, do, run.v, scale, False)
    run.add_pair_gradients((dq, db, dg), run.q, run.b, do, u, scale, False)
    run.add_pair_gradients((da, dk, dg), run.a, run.k, dz, run.v, 1.0, True)
    run.add_pair_gradients((da, db, dg), run.a, run.b, dz, u, 1.0, True)
    states = before, after
    dq, dk, dg = run.gradients((run.q, run.k, run.v, do), states, (dq, dk, dg), torch.float32, scale, False)
    da, db, dg = run.gradients((run.a, run.b, u, dz), states, (da, db, dg), decay.dtype, 1.0, True)
    return dq, dk, dv, da, db, dg, grad_initial
