"""Linear attention with a decay per channel on a GPU (the algebra is in ``chunked.py``).

    pairs_kernel            A, a sub-block of 16 rows per program (``common/triton_pairs.py``)
    states_kernel           the states, chunk after chunk; run in reverse on (q, do), their gradients
    output_kernel           o = A v + (exp(P) q) S
    values_kernel           dv = A^T do + (exp(R) k) E
    scores_kernel           dA = do v^T
    pair_gradients_kernel   what dA gives to q, k, g and u
    gradients_kernel        dq, dk and dg: those, and what the states give

All but the states take every chunk at once. Decays are summed and products accumulated in float32.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mstc.kernels.common.outputs import empty_outputs
from mstc.kernels.common.segments import CHUNK
from mstc.kernels.common.tables import ChunkTable, chunk_table, sequence_rows
from mstc.kernels.common.triton_blocks import load_rows, load_state, pick_tiles, store_rows, store_state
from mstc.kernels.common.triton_pairs import (
    SUB_CHUNK,
    later_sums,
    load_span,
    pair_gradients_kernel,
    pairs_kernel,
    prefix_sums,
    shift_down,
    suffix_sums,
)

__all__ = [
    "WARPS",
    "backward",
    "forward",
    "gradients_kernel",
    "output_kernel",
    "pair_gradients_kernel",
    "pairs_kernel",
    "scores_kernel",
    "states_kernel",
    "values_kernel",
]

WARPS = {"states": 8, "output": 8, "values": 8, "scores": 8, "pairs": 4, "pair_gradients": 4, "gradients": 8}
"""Warps per program: with half as many, most kernels spill registers at K = V = 128 (``mstc.kernels.aot``)."""
PAIR_TILE = 16
"""Columns of K per step of the pairs' kernels, which hold [16, 16, PAIR_TILE] products in registers."""


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
    HAS_U: tl.constexpr,
    HAS_STATE: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """S <- diag(exp(P_C)) S + (w x)^T y over a sequence's chunks; p_h gets S as each chunk finds it.

    Forward: x = k, y = v, w = exp(R). Reverse: x = q, y = do, w = scale exp(P).
    """
    i_nh, i_k, i_v = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i_n, i_h = i_nh // H, i_nh % H
    head, end = tl.load(p_first + i_n), tl.load(p_first + i_n + 1)
    b_h = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_STATE:
        b_h += load_state(p_first_state, i_nh, i_k, i_v, K, V, BK, BV).to(tl.float32)
    for i in range(end - head):
        i_c = head + i
        if REVERSE:
            i_c = end - 1 - i
        start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
        store_state(p_h, b_h, i_c * H + i_h, i_k, i_v, K, V, BK, BV)
        b_x = load_rows(p_x, i_h, start, stop, i_k, H, K, BT, BK)
        b_y = load_rows(p_y, i_h, start, stop, i_v, H, V, BT, BV)
        if REVERSE:
            b_w = scale * tl.exp(prefix_sums(p_g, i_h, start, stop, i_k, H, K, BT, BK, HAS_U))
        else:
            b_w = tl.exp(suffix_sums(p_g, i_h, start, stop, i_k, H, K, BT, BK))
        total = tl.sum(load_span(p_g, i_h, start, start, stop, i_k, H, K, BT, BK), 0)
        b_x = (b_x * b_w).to(b_y.dtype)
        b_h = b_h * tl.exp(total)[:, None] + tl.dot(tl.trans(b_x), b_y, input_precision="ieee")
    store_state(p_last_state, b_h, i_nh, i_k, i_v, K, V, BK, BV)


@triton.jit
def output_kernel(
    p_q,
    p_v,
    p_g,
    p_a,
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
    HAS_U: tl.constexpr,
):
    """o = A v + scale (exp(P) q) S, one chunk and BV columns per program; A holds the scale."""
    i_c, i_v, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    i_s = i_c * H + i_h
    b_v = load_rows(p_v, i_h, start, stop, i_v, H, V, BT, BV)
    b_o = tl.dot(load_state(p_a, i_s, 0, 0, BT, BT, BT, BT), b_v, input_precision="ieee")
    for i_k in range(tl.cdiv(K, BK)):
        b_q = load_rows(p_q, i_h, start, stop, i_k, H, K, BT, BK)
        b_w = scale * tl.exp(prefix_sums(p_g, i_h, start, stop, i_k, H, K, BT, BK, HAS_U))
        b_h = load_state(p_h, i_s, i_k, i_v, K, V, BK, BV)
        b_o += tl.dot((b_q * b_w).to(b_h.dtype), b_h, input_precision="ieee")
    store_rows(p_o, b_o, i_h, start, stop, i_v, H, V, BT, BV)


@triton.jit
def values_kernel(
    p_k,
    p_g,
    p_do,
    p_a,
    p_dh,
    p_dv,
    p_starts,
    p_stops,
    H: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """dv = A^T do + (exp(R) k) E, one chunk and BV columns per program."""
    i_c, i_v, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    i_s = i_c * H + i_h
    b_do = load_rows(p_do, i_h, start, stop, i_v, H, V, BT, BV)
    b_dv = tl.dot(tl.trans(load_state(p_a, i_s, 0, 0, BT, BT, BT, BT)), b_do, input_precision="ieee")
    for i_k in range(tl.cdiv(K, BK)):
        b_k = load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK)
        b_w = tl.exp(suffix_sums(p_g, i_h, start, stop, i_k, H, K, BT, BK))
        b_dh = load_state(p_dh, i_s, i_k, i_v, K, V, BK, BV)
        b_dv += tl.dot((b_k * b_w).to(b_dh.dtype), b_dh, input_precision="ieee")
    store_rows(p_dv, b_dv, i_h, start, stop, i_v, H, V, BT, BV)


@triton.jit
def scores_kernel(
    p_do,
    p_v,
    p_da,
    p_starts,
    p_stops,
    scale,
    H: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
):
    """dA = scale do v^T, [chunks, H, BT, BT], zero above the diagonal."""
    i_c, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    b_da = tl.zeros([BT, BT], dtype=tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        b_do = load_rows(p_do, i_h, start, stop, i_v, H, V, BT, BV)
        b_v = load_rows(p_v, i_h, start, stop, i_v, H, V, BT, BV)
        b_da += tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    o_t = tl.arange(0, BT)
    b_da = tl.where(o_t[:, None] >= o_t[None, :], b_da * scale, 0.0)
    store_state(p_da, b_da, i_c * H + i_h, 0, 0, BT, BT, BT, BT)


@triton.jit
def gradients_kernel(
    p_q,
    p_k,
    p_v,
    p_g,
    p_do,
    p_h,
    p_dh,
    p_pair_dq,
    p_pair_dk,
    p_pair_dg,
    p_dq,
    p_dk,
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
    HAS_U: tl.constexpr,
    HAS_LAST: tl.constexpr = True,
):
    """dq, dk and dg of one chunk and BK columns: what its pairs gave, and what S before it and E after it give.

    Without HAS_LAST dg leaves out the decay of S itself, for a caller with several left and right operands.
    """
    i_c, i_k, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(p_starts + i_c), tl.load(p_stops + i_c)
    i_s = i_c * H + i_h
    total = tl.sum(load_span(p_g, i_h, start, start, stop, i_k, H, K, BT, BK), 0)
    b_dq = tl.zeros([BT, BK], dtype=tl.float32)
    b_inner = tl.zeros([BK], dtype=tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        b_do = load_rows(p_do, i_h, start, stop, i_v, H, V, BT, BV)
        b_h = load_state(p_h, i_s, i_k, i_v, K, V, BK, BV)
        b_dh = load_state(p_dh, i_s, i_k, i_v, K, V, BK, BV)
        b_dq += tl.dot(b_do, tl.trans(b_h), input_precision="ieee")
        b_inner += tl.sum(b_h.to(tl.float32) * b_dh.to(tl.float32), 1)
    b_dg = load_span(p_pair_dg, i_h, start, start, stop, i_k, H, K, BT, BK)
    if HAS_LAST:
        b_dg += (b_inner * tl.exp(total))[None, :]
    b_dq *= scale * tl.exp(prefix_sums(p_g, i_h, start, stop, i_k, H, K, BT, BK, HAS_U))
    b_dg += later_sums(b_dq * load_rows(p_q, i_h, start, stop, i_k, H, K, BT, BK), BT, BK, HAS_U)
    b_dq += load_rows(p_pair_dq, i_h, start, stop, i_k, H, K, BT, BK)
    store_rows(p_dq, b_dq, i_h, start, stop, i_k, H, K, BT, BK)

    b_dk = tl.zeros([BT, BK], dtype=tl.float32)
    for i_v in range(tl.cdiv(V, BV)):
        b_v = load_rows(p_v, i_h, start, stop, i_v, H, V, BT, BV)
        b_dh = load_state(p_dh, i_s, i_k, i_v, K, V, BK, BV)
        b_dk += tl.dot(b_v, tl.trans(b_dh), input_precision="ieee")
    b_dk *= tl.exp(suffix_sums(p_g, i_h, start, stop, i_k, H, K, BT, BK))
    b_dg += shift_down(tl.cumsum(b_dk * load_rows(p_k, i_h, start, stop, i_k, H, K, BT, BK), 0), BT, BK)
    b_dk += load_rows(p_pair_dk, i_h, start, stop, i_k, H, K, BT, BK)
    store_rows(p_dk, b_dk, i_h, start, stop, i_k, H, K, BT, BK)
    store_rows(p_dg, b_dg, i_h, start, stop, i_k, H, K, BT, BK)


@dataclass(frozen=True)
class Launch:
    """What the launches of one call share; tensors are contiguous, ``bonus`` is None without one."""

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    bonus: Tensor | None
    table: ChunkTable
    tiles: dict[str, Any]
    scale: float

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def columns(self) -> tuple[int, int]:
        """Blocks of K and of V."""
        return triton.cdiv(self.tiles["K"], self.tiles["BK"]), triton.cdiv(self.tiles["V"], self.tiles["BV"])

    def given(self, kernel: str, **constants: Any) -> dict[str, Any]:
        """The constants of a kernel that takes blocks of K and V."""
        return {"H": self.heads, **self.tiles, "num_warps": WARPS[kernel], **constants}

    def pair_constants(self, kernel: str) -> dict[str, Any]:
        """The constants of the pairs' kernels."""
        sizes = {"K": self.tiles["K"], "BT": self.tiles["BT"], "BC": SUB_CHUNK, "BK": PAIR_TILE}
        return {"H": self.heads, **sizes, "HAS_U": self.bonus is not None, "num_warps": WARPS[kernel]}

    def square(self, dtype: torch.dtype) -> Tensor:
        """Room for a value per pair of tokens of a chunk."""
        return self.q.new_empty((self.table.chunks, self.heads, CHUNK, CHUNK), dtype=dtype)

    @property
    def sub_chunks(self) -> int:
        return self.table.chunks * (CHUNK // SUB_CHUNK)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, bonus: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> Launch:
    table = chunk_table(q.shape[0], q.shape[1], cu_seqlens, q.device)
    q, k, v, decay = (x.contiguous() for x in (q, k, v, decay))
    bonus = None if bonus is None else bonus.contiguous()
    return Launch(q, k, v, decay, bonus, table, pick_tiles(q, v), scale)


def _states(run: Launch, x: Tensor, y: Tensor, first_state: Tensor | None, reverse: bool) -> tuple[Tensor, Tensor]:
    """(states [chunks, H, K, V] as each chunk finds them, the last one [N, H, K, V])."""
    shape = (run.heads, run.tiles["K"], run.tiles["V"])
    states = x.new_empty((run.table.chunks, *shape))
    last = x.new_empty((run.table.sequences, *shape), dtype=torch.float32)
    states_kernel[(run.table.sequences * run.heads, *run.columns)](
        x,
        y,
        run.decay,
        last if first_state is None else first_state,
        states,
        last,
        *run.table.span,
        run.table.first,
        run.scale,
        **run.given("states", HAS_U=run.bonus is not None, HAS_STATE=first_state is not None, REVERSE=reverse),
    )
    return states, last


def _pairs(run: Launch) -> Tensor:
    """scale A of every chunk, in the dtype in which it is multiplied."""
    pairs = run.square(run.q.dtype)
    bonus = run.q if run.bonus is None else run.bonus
    pairs_kernel[(run.sub_chunks, run.heads)](
        run.q, run.k, run.decay, bonus, pairs, *run.table.span, run.scale, **run.pair_constants("pairs")
    )
    return pairs


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, final states, kept states); of the kept states only each sequence's first is filled."""
    out, _, kept = empty_outputs(q, v, cu_seqlens)
    run = _launch(q, k, v, decay, bonus, cu_seqlens, scale)
    initial_state = None if initial_state is None else initial_state.contiguous()
    states, final = _states(run, run.k, run.v, initial_state, False)
    kept.zero_()
    if initial_state is not None:
        kept[run.table.slots, sequence_rows(run.table, cu_seqlens)] = initial_state.to(kept.dtype)
    output_kernel[(run.table.chunks, run.columns[1], run.heads)](
        run.q,
        run.v,
        run.decay,
        _pairs(run),
        states,
        out,
        *run.table.span,
        scale,
        **run.given("output", HAS_U=bonus is not None),
    )
    return out, final, kept


def _value_gradients(run: Launch, do: Tensor, grad_states: Tensor) -> Tensor:
    dv = torch.empty_like(run.v)
    values_kernel[(run.table.chunks, run.columns[1], run.heads)](
        run.k, run.decay, do, _pairs(run), grad_states, dv, *run.table.span, **run.given("values")
    )
    return dv


def _pair_gradients(run: Launch, do: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """What dA gives to (q, k, decay), in float32, and the gradient of the bonus (empty without one)."""
    scores = run.square(torch.float32)
    sizes = {name: run.tiles[name] for name in ("V", "BT", "BV")}
    scores_kernel[(run.table.chunks, run.heads)](
        do, run.v, scores, *run.table.span, run.scale, H=run.heads, **sizes, num_warps=WARPS["scores"]
    )
    dq, dk, dg = (torch.empty_like(run.q, dtype=torch.float32) for _ in range(3))
    key = run.tiles["K"]
    bonus = run.q if run.bonus is None else run.bonus
    du = run.q.new_empty(0 if run.bonus is None else (run.sub_chunks, run.heads, key), dtype=torch.float32)
    pair_gradients_kernel[(run.sub_chunks, triton.cdiv(key, PAIR_TILE), run.heads)](
        run.q, run.k, run.decay, bonus, scores, dq, dk, dg, du, *run.table.span, **run.pair_constants("pair_gradients")
    )
    return (dq, dk, dg), du if run.bonus is None else du.sum(0).to(run.bonus.dtype)


def backward(
    grad_out: Tensor,
    grad_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    bonus: Tensor | None,
    kept: Tensor,
    cu_seqlens: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, decay, bonus (empty without one) and the initial states."""
    run, do = _launch(q, k, v, decay, bonus, cu_seqlens, scale), grad_out.contiguous()
    initial = kept[run.table.slots, sequence_rows(run.table, cu_seqlens)]
    states, _ = _states(run, run.k, run.v, initial, False)
    last = None if grad_final is None else grad_final.contiguous()
    grad_states, grad_initial = _states(run, run.q, do, last, True)
    dv = _value_gradients(run, do, grad_states)
    pair_grads, du = _pair_gradients(run, do)
    dq, dk, dg = (torch.empty_like(x) for x in (run.q, run.k, run.decay))
    gradients_kernel[(run.table.chunks, run.columns[0], run.heads)](
        run.q,
        run.k,
        run.v,
        run.decay,
        do,
        states,
        grad_states,
        *pair_grads,
        dq,
        dk,
        dg,
        *run.table.span,
        scale,
        **run.given("gradients", HAS_U=bonus is not None),
    )
    return dq, dk, dv, dg, du, grad_initial
