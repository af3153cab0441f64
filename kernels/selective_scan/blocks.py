"""The selective scan on a CPU, a few tokens at a time in registers: bodies for Inductor and the loop around them.

A body takes a block of L tokens and writes the recurrence out, token after token, as elementwise
code over [N, D]. Inductor makes one loop of it in which a lane keeps its state in a register, so that
each exponential is made once per walk and nothing of size [T, N, D] is ever held; sums over N and D follow
while the block is in the cache. Short blocks are best: what a block keeps for its sums is L N D
numbers, and must fit there; channels are taken in tiles of TILE / N for the same reason.

The forward keeps a state per segment of S tokens; S grows with N, so that they are at most D / 2 numbers
per token (up to N = 256). The backward walks from there to the state before each block, then takes the blocks in
reverse (the equations are in ``chunked.py``): with W_t = exp(dt_t A) dh_t and P_t = W_t h_{t-1},

    dh_t = C_t dy_t + W_{t+1}    ddt_t = sum_n P_t A + x_t du_t    dA = sum_t P_t dt_t

A tail is padded with zero tokens: dt = 0 leaves the state as it is.

A body takes some 40 us of one thread and writes to arguments that it does not read; its channels are shared among as
many threads as there is work for. Where other programs take the cores, they wait for each other longer than that:
`torch.set_num_threads(1)` is faster there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from mstc.kernels.common.segments import Span, count_states, spans, state_dtype
from mstc.kernels.selective_scan.exponential import exp

__all__ = ["run_backward", "run_forward", "segment_tokens"]

FORWARD_TOKENS = 16
REVERSE_TOKENS = 8
"""L: longer blocks take fewer calls; the reverse one keeps three times as much and runs out of registers sooner."""
WALK_TOKENS = 32
"""Tokens of one walk towards the states before the blocks of a segment."""
TILE = 8192
"""Channels times columns worked on at once by a thread: 256 KiB of states per 8 tokens in float32."""
STRETCH = 512
"""Tokens that are converted and padded at once; a multiple of every segment."""

Block = tuple[Tensor, ...]
Walk = tuple[Callable[..., Block], Sequence[Block]]


def segment_tokens(columns: int) -> int:
    """S: tokens from one kept state to the next, a power of two of at least 32 and 2 N, at most STRETCH."""
    tokens = WALK_TOKENS
    while tokens < min(2 * columns, STRETCH):
        tokens *= 2
    return tokens


def _walk(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, state: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The decay of each token and the states, the one before the first token included."""
    decays, states = [], [state]
    for x_t, dt_t, b_t in zip(x.unbind(0), dt.unbind(0), b.unbind(0), strict=True):
        decays.append(exp(dt_t * a))
        states.append(decays[-1] * states[-1] + (dt_t * x_t) * b_t.unsqueeze(-1))
    return decays, states


def forward_block(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, y: Tensor, final: Tensor
) -> Block:
    """x, dt [L, D], a [N, D], b, c [L, N], ``state`` [N, D] before the block; fills y [L, D] and the state after it."""
    _, states = _walk(x, dt, a, b, state)
    y.copy_((torch.stack(states[1:]) * c.unsqueeze(-1)).sum(1))
    final.copy_(states[-1])
    return ()


def walk_block(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, state: Tensor) -> Block:
    """The states after every REVERSE_TOKENS tokens."""
    return tuple(_walk(x, dt, a, b, state)[1][REVERSE_TOKENS::REVERSE_TOKENS])


def reverse_block(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    dy: Tensor,
    state: Tensor,
    grad: Tensor,
    total: Tensor,
    *targets: Tensor,
) -> Block:
    """``state`` [N, D]: before the block; ``grad``: that of the state after it; ``total``: dA of the tokens after it.

    Fills ``targets``: dx, ddt [L, D], db, dc [L, N], the gradient of the state before the block, and dA with it.
    """
    decays, states = _walk(x, dt, a, b, state)
    dh: list[Tensor] = []
    products: list[Tensor] = []
    for t in reversed(range(x.shape[0])):
        dh.insert(0, grad + dy[t] * c[t].unsqueeze(-1))
        grad = decays[t] * dh[0]
        products.insert(0, grad * states[t])
        total = total + products[0] * dt[t]
    stacked = torch.stack(dh)
    du = (stacked * b.unsqueeze(-1)).sum(1)
    ddt = (torch.stack(products) * a).sum(1) + x * du
    db = (stacked * (dt * x).unsqueeze(1)).sum(-1)
    dc = (torch.stack(states[1:]) * dy.unsqueeze(1)).sum(-1)
    for target, value in zip(targets, (dt * du, ddt, db, dc, grad, total), strict=True):
        target.copy_(value)
    return ()


@cache
def _compile(
    function: Callable[..., Block], shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, threads: int
) -> Callable[..., Block]:
    from mstc.compat import compile_block

    return compile_block(function, [torch.zeros(shape, dtype=dtype) for shape in shapes], threads)


def _body(function: Callable[..., Block], *examples: Tensor) -> Callable[..., Block]:
    """``function`` for contiguous tensors of these shapes and the threads that torch has now."""
    return _compile(function, tuple(tuple(e.shape) for e in examples), examples[0].dtype, torch.get_num_threads())


def _tiles(a: Tensor) -> list[slice]:
    """The channels of A [D, N], in equal parts as far as that goes."""
    channels, columns = a.shape
    parts = -(-channels * columns // (TILE * torch.get_num_threads()))
    width = -(-channels // parts)
    return [slice(start, min(start + width, channels)) for start in range(0, channels, width)]


def _load(tensor: Tensor, row: int, start: int, stop: int, columns: slice, segment: int, dtype: torch.dtype) -> Tensor:
    """Tokens [start, stop) of a row, as whole segments."""
    part = tensor[row, start:stop, columns]
    rest = -part.shape[0] % segment
    return (pad(part, (0, 0, 0, rest)) if rest else part).to(dtype).contiguous()


def _stretches(span: Span, segment: int) -> Iterator[tuple[int, int, int]]:
    """(slot of the first kept state, start, stop) of each stretch of a span."""
    for start in range(span.start, span.stop, STRETCH):
        yield span.first_slot + (start - span.start) // segment, start, min(start + STRETCH, span.stop)


def _rows(batch: int, tokens: int, cu_seqlens: Tensor | None, segment: int) -> Iterator[tuple[int, int, Span]]:
    """(row, state, span) of each sequence."""
    for span in spans(batch, tokens, cu_seqlens, segment):
        for i in range(span.rows):
            yield span.row + i, span.state + i, span


def _cut(tensor: Tensor, tokens: int, start: int = 0, stop: int | None = None) -> Block:
    """[T, D] cut every so many tokens; of each piece those from ``start`` to ``stop``."""
    return tensor.view(-1, tokens, tensor.shape[1])[:, start:stop].unbind(0)


def _target(tensor: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """What bodies write to: [T, D] itself, or a buffer that ``_deliver`` copies from, without the padding."""
    if tensor.shape[0] == tokens and tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return tensor.new_empty((tokens, tensor.shape[1]), dtype=dtype)


def _deliver(tensor: Tensor, target: Tensor) -> None:
    if target is not tensor:
        tensor.copy_(target[: tensor.shape[0]])


def _forward_stretch(part: Sequence[Tensor], matrix: Tensor, y: Tensor, kept: Tensor, state: Tensor) -> Tensor:
    """A stretch of whole segments: part x, dt, b, c; fills y [T, D], kept [segments, N, D]; the state after it.

    Blocks write by turns into ``state`` and a second buffer.
    """
    target = _target(y, part[0].shape[0], state.dtype)
    blocks = list(zip(*(_cut(p, FORWARD_TOKENS) for p in (*part, target)), strict=True))
    x, dt, b, c, out = blocks[0]
    final = torch.empty_like(state)
    body = _body(forward_block, x, dt, matrix, b, c, state, out, final)
    per_segment = len(blocks) // kept.shape[0]
    for i, (x, dt, b, c, out) in enumerate(blocks):
        if i % per_segment == 0:
            kept[i // per_segment] = state
        body(x, dt, matrix, b, c, state, out, final)
        state, final = final, state
    _deliver(y, target)
    return state


@torch.no_grad()
def run_forward(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final states [S, D, N], the state at each segment's start [slot, B, N, D])."""
    batch, length, channels = x.shape
    columns, dtype, segment = a.shape[1], state_dtype(x.dtype), segment_tokens(a.shape[1])
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    y, whole = x.new_empty(x.shape), slice(None)
    final = x.new_zeros((documents or batch, *a.shape), dtype=dtype)
    kept = x.new_zeros((count_states(length, documents, segment), batch, columns, channels), dtype=dtype)
    if initial_state is not None:
        final.copy_(initial_state)
    for tile in _tiles(a):
        matrix = a[tile].to(dtype).mT.contiguous()
        for row, sequence, span in _rows(batch, length, cu_seqlens, segment):
            state = final[sequence, tile].mT.contiguous()
            for slot, start, stop in _stretches(span, segment):
                loads = ((x, tile), (dt, tile), (b, whole), (c, whole))
                part = [_load(t, row, start, stop, w, segment, dtype) for t, w in loads]
                states = kept[slot : slot + part[0].shape[0] // segment, row, :, tile]
                state = _forward_stretch(part, matrix, y[row, start:stop, tile], states, state)
            final[sequence, tile] = state.mT
    return y, final, kept


def _walks(part: Sequence[Tensor], matrix: Tensor, segment: int) -> list[Walk]:
    """The walks through a segment, one after the other: the body, and its x, dt, b for each segment of the stretch."""
    walks: list[Walk] = []
    last = segment - REVERSE_TOKENS
    for start in range(0, last, WALK_TOKENS):
        stop = min(start + WALK_TOKENS, last)
        rows = list(zip(*(_cut(p, segment, start, stop) for p in part), strict=True))
        x, dt, b = rows[0]
        walks.append((_body(walk_block, x, dt, matrix, b, matrix), rows))
    return walks


def _states_before(walks: Sequence[Walk], i: int, matrix: Tensor, state: Tensor) -> list[Tensor]:
    """The state before each block of segment i, which starts from ``state``."""
    states = [state]
    for body, rows in walks:
        x, dt, b = rows[i]
        states.extend(body(x, dt, matrix, b, states[-1]))
    return states


def _reverse_stretch(
    part: Sequence[Tensor],
    matrix: Tensor,
    kept: Tensor,
    carried: Block,
    grads: Sequence[Tensor],
) -> Block:
    """A stretch of whole segments in reverse: part x, dt, b, c, dy; kept [segments, N, D].

    Fills the first two of ``grads``, dx and ddt [T, D], and adds to the others, db and dc [T, N]. ``carried``: the
    gradient of the state after the stretch and dA of the tokens after it, [N, D] both; returns those before it. Blocks
    write by turns into these and a second pair.
    """
    tokens, dtype = part[0].shape[0], matrix.dtype
    targets = [_target(grad, tokens, dtype) for grad in grads[:2]]
    targets += [grad.new_empty((tokens, grad.shape[1]), dtype=dtype) for grad in grads[2:]]
    blocks = [_cut(p, REVERSE_TOKENS) for p in (*part, *targets)]
    x, dt, b, c, dy, *outs = (p[0] for p in blocks)
    other: Block = tuple(map(torch.empty_like, carried))
    body = _body(reverse_block, x, dt, matrix, b, c, dy, matrix, *carried, *outs, *other)
    segment = tokens // kept.shape[0]
    walks = _walks(part[:3], matrix, segment)
    for i in reversed(range(kept.shape[0])):
        before = _states_before(walks, i, matrix, kept[i].contiguous())
        first = i * len(before)
        for j in reversed(range(len(before))):
            x, dt, b, c, dy, *outs = (p[first + j] for p in blocks)
            body(x, dt, matrix, b, c, dy, before[j], *carried, *outs, *other)
            carried, other = other, carried
    for grad, target in zip(grads[:2], targets[:2], strict=True):
        _deliver(grad, target)
    for grad, target in zip(grads[2:], targets[2:], strict=True):
        grad += target[: grad.shape[0]]
    return carried


@torch.no_grad()
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
    dtype, segment, whole = kept.dtype, segment_tokens(a.shape[1]), slice(None)
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    db, dc = (t.new_zeros(t.shape, dtype=dtype) for t in (b, c))
    da, initial = a.new_empty(a.shape), kept.new_zeros((documents or batch, *a.shape))
    if grad_final is not None:
        initial.copy_(grad_final)
    for tile in _tiles(a):
        matrix = a[tile].to(dtype).mT.contiguous()
        total = torch.zeros_like(matrix)
        for row, sequence, span in _rows(batch, length, cu_seqlens, segment):
            grad_state = initial[sequence, tile].mT.contiguous()
            for slot, start, stop in reversed(list(_stretches(span, segment))):
                loads = ((x, tile), (dt, tile), (b, whole), (c, whole), (grad_out, tile))
                part = [_load(t, row, start, stop, w, segment, dtype) for t, w in loads]
                states = kept[slot : slot + part[0].shape[0] // segment, row, :, tile]
                grads = [g[row, start:stop, w] for g, w in ((dx, tile), (ddt, tile), (db, whole), (dc, whole))]
                grad_state, total = _reverse_stretch(part, matrix, states, (grad_state, total), grads)
            initial[sequence, tile] = grad_state.mT
        da[tile] = total.mT
    return dx, ddt, da, db.to(b.dtype), dc.to(c.dtype), initial
