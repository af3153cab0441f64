"""The loop over a sequence: segments of whole chunks, one state from each to the next.

A *chunk* is the C tokens that are worked on by matrix products; a *segment* is the SEGMENT
tokens whose chunks are worked on at once. A class supplies a body for one segment,

    forward:  (tokens, shared, S0)          -> (o, S1)
    backward: (tokens, shared, S0, do, dS1) -> (dtokens, dshared, dS0)

with per-token tensors laid out [X, N, C, ...] (X = rows times heads, N chunks) and S [X, K, V].
The loop copies one segment at a time into that layout, so that what is held beyond inputs and
outputs does not grow with T; the forward keeps S at each segment's start, the backward reads them
in reverse. A tail is padded with zero tokens: k = v = 0 and a log decay of 0 leave S as it is.
Packed documents (``cu_seqlens``) are spans that are looped over one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mstc.kernels.common.checks import check_offsets

__all__ = ["CHUNK", "SEGMENT", "Body", "count_states", "run_backward", "run_forward", "state_dtype"]

CHUNK = 64
SEGMENT = 512
ROW_TOKENS = 512
"""Rows of a batch of short sequences are taken together up to this many tokens."""

Tokens = tuple[Any, ...]
"""Per-token (or per-head) tensors in a fixed order, each a Tensor or None."""


@dataclass(frozen=True)
class Body:
    """A class's functions for one segment (see the module's docstring) and its chunk length."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tokens, Tokens, Tensor]]
    chunk: int = CHUNK


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of rows [row, row + rows): the sequences ``row``... or one document."""

    row: int
    rows: int
    start: int
    stop: int
    state: int
    first_slot: int
    segment: int

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """(slot, start, stop) of each segment, in order."""
        for i, start in enumerate(range(self.start, self.stop, self.segment)):
            yield self.first_slot + i, start, min(start + self.segment, self.stop)


def count_states(tokens: int, documents: int | None, segment: int = SEGMENT) -> int:
    """How many slots of kept states [slot, B, H, K, V] a forward over T tokens needs at most."""
    return (tokens + segment - 1) // segment if documents is None else tokens // segment + documents


def spans(batch: int, tokens: int, cu_seqlens: Tensor | None, segment: int = SEGMENT) -> list[Span]:
    """The spans of a batch, or of its packed documents, with a kept state per ``segment`` tokens."""
    if cu_seqlens is None:
        rows = max(1, ROW_TOKENS // tokens)
        return [Span(b, min(rows, batch - b), 0, tokens, b, 0, segment) for b in range(0, batch, rows)]
    found, slot = [], 0
    offsets = check_offsets(cu_seqlens, tokens)
    for i, (start, stop) in enumerate(pairwise(offsets)):
        found.append(Span(0, 1, start, stop, i, slot, segment))
        slot += -(-(stop - start) // segment)
    return found


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    from mstc.compat import compile_by_shape
    from mstc.ops.products import fast_products

    return compile_by_shape(function, fast_products)


def _pick(function: Callable[..., Any], compiled: bool) -> Callable[..., Any]:
    return _compiled(function) if compiled else function


def _load(tensor: Tensor | None, span: Span, start: int, stop: int, chunk: int, dtype: torch.dtype) -> Tensor | None:
    """[B, T, H, ...] -> the segment as [X, N, C, ...] in ``dtype``, padded with zeros."""
    if tensor is None:
        return None
    part = tensor[span.row : span.row + span.rows, start:stop].transpose(1, 2)
    rows, heads, length = part.shape[:3]
    padded = -(-length // chunk) * chunk
    out = part.new_empty((rows, heads, padded, *part.shape[3:]), dtype=dtype)
    out[:, :, :length] = part
    if padded > length:
        out[:, :, length:] = 0
    return out.view(rows * heads, padded // chunk, chunk, *part.shape[3:])


def _load_all(
    tokens: Tokens, span: Span, start: int, stop: int, chunk: int, dtype: torch.dtype, scale: float
) -> Tokens:
    """A segment of every tensor; the first, q, times ``scale``."""
    parts = [_load(t, span, start, stop, chunk, dtype) for t in tokens]
    if parts[0] is not None:
        parts[0].mul_(scale)
    return tuple(parts)


def _store(tensor: Tensor, part: Tensor, span: Span, start: int, stop: int) -> None:
    """The inverse of ``_load``, into ``tensor`` [B, T, H, ...]."""
    heads = tensor.shape[2]
    flat = part.reshape(span.rows, heads, -1, *part.shape[3:])[:, :, : stop - start]
    tensor[span.row : span.row + span.rows, start:stop] = flat.transpose(1, 2)


def _shared(shared: Tokens, rows: int, dtype: torch.dtype) -> Tokens:
    """Per-head tensors [H, ...] -> [X, ...]."""
    return tuple(None if t is None else t.to(dtype).repeat(rows, *[1] * (t.dim() - 1)) for t in shared)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_forward(
    body: Body,
    tokens: Tokens,
    shared: Tokens,
    out: Tensor,
    state_shape: Sequence[int],
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tensor, Tensor]:
    """Fill ``out`` [B, T, H, V]; return (final states [S, H, K, V], kept states [slot, B, H, K, V]).

    ``tokens[0]`` is q: it gives B, T, H and the dtype, and is multiplied by ``scale``; ``state_shape`` is (K, V).
    """
    first = tokens[0]
    batch, length, heads = first.shape[:3]
    dtype = state_dtype(first.dtype)
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = first.new_zeros((documents or batch, heads, *state_shape), dtype=dtype)
    kept = first.new_zeros((count_states(length, documents), batch, heads, *state_shape), dtype=dtype)
    if initial_state is not None:
        final.copy_(initial_state)
    forward = _pick(body.forward, compiled)
    for span in spans(batch, length, cu_seqlens):
        rows, states = slice(span.row, span.row + span.rows), slice(span.state, span.state + span.rows)
        per_head = _shared(shared, span.rows, dtype)
        state = final[states].reshape(-1, *state_shape)
        for slot, start, stop in span.segments():
            kept[slot, rows] = state.view(span.rows, heads, *state_shape)
            part = _load_all(tokens, span, start, stop, body.chunk, dtype, scale)
            o, state = forward(part, per_head, state)
            _store(out, o, span, start, stop)
        final[states] = state.view(span.rows, heads, *state_shape)
    return final, kept


def run_backward(
    body: Body,
    tokens: Tokens,
    shared: Tokens,
    kept: Tensor,
    grad_out: Tensor,
    grad_final: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    compiled: bool,
) -> tuple[Tokens, Tokens, Tensor]:
    """The gradients of ``run_forward``: (of tokens, of shared, of the initial states)."""
    first = tokens[0]
    batch, length, heads = first.shape[:3]
    dtype, state_shape = kept.dtype, kept.shape[3:]
    documents = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grads = tuple(None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in tokens)
    sums = tuple(None if t is None else torch.zeros_like(t, dtype=dtype) for t in shared)
    grad_initial = kept.new_zeros((documents or batch, heads, *state_shape))
    if grad_final is not None:
        grad_initial.copy_(grad_final)
    backward = _pick(body.backward, compiled)
    for span in spans(batch, length, cu_seqlens):
        rows, states = slice(span.row, span.row + span.rows), slice(span.state, span.state + span.rows)
        per_head = _shared(shared, span.rows, dtype)
        grad_state = grad_initial[states].reshape(-1, *state_shape)
        for slot, start, stop in reversed(list(span.segments())):
            part = _load_all(tokens, span, start, stop, body.chunk, dtype, scale)
            do = _load(grad_out, span, start, stop, body.chunk, dtype)
            state = kept[slot, rows].reshape(-1, *state_shape)
            part_grads, part_sums, grad_state = backward(part, per_head, state, do, grad_state)
            part_grads[0].mul_(scale)
            for grad, part_grad in zip(grads, part_grads, strict=True):
                if grad is not None and part_grad is not None:
                    _store(grad, part_grad, span, start, stop)
            for total, part_sum in zip(sums, part_sums, strict=True):
                if total is not None and part_sum is not None:
                    total += part_sum.view(span.rows, *total.shape).sum(0)
        grad_initial[states] = grad_state.view(span.rows, heads, *state_shape)
    totals = tuple(None if s is None else s.to(t.dtype) for t, s in zip(shared, sums, strict=True))
    return grads, totals, grad_initial
