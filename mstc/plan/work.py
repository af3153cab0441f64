"""What a loop costs besides what it reads and makes: temporaries, FLOPs and bytes moved.

A body's values are affine in the tokens of a chunk, so what is measured on the body of one length is

    live(t) = fixed + t * per_token,   work(t) = live(t) + what the loop itself holds of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mstc.ops.body import Value
from mstc.ops.program import Program


@dataclass(frozen=True)
class LoopCost:
    """Forward and backward: temporaries at the peak, FLOPs, bytes moved, bytes asked of the system; rows of one chunk's
    products."""

    work: tuple[int, int]
    flops: tuple[float, float]
    moved: tuple[float, float]
    rows: float
    fresh: tuple[float, float]


def loop_work(p: Program, loss: bool, count: int | None = None) -> LoopCost:
    """The costs of a loop program, or of the same in ``count`` chunks, read off its bodies and `mstc.ops.loop`."""
    count = p.count if count is None else count
    length = -(-p.n // count)
    live = [x * length // p.costs.length for x in p.costs.live]
    pieces = sum(_copied(v, length) for v in p.tokens)
    results = sum(_chunk_bytes(v, length) for v in p.outputs) + sum(v.nbytes for v in p.sums)
    held = results if count > 1 else 0  # the chunk before is dropped after the next has run
    forward = live[0] + held + pieces
    backward = 0
    if p.backward is not None:
        b = p.backward
        incoming = sum(_copied(p.outputs[i], length) for i in b.grads if i < len(p.outputs))
        kept = sum(_copied(p.outputs[i], length) for i in b.kept)
        backward = live[1] + pieces + incoming + kept + _wider(p)
    flops = p.flops()
    moved = _moved(p, count)
    made = sum(v.nbytes for v in p.outputs)
    if loss and p.backward is not None:
        # Forward and gradients in one; the backward scales them.
        moved = (moved[0] + moved[1], 2.0 * _gradients(p))
        work, fresh = (backward, _largest_gradient(p)), (float(backward + made + _gradients(p)), 0.0)
        return LoopCost(work, (flops[1], 0.0), moved, length * _rows(p), fresh)
    # A chunk's temporaries lie where those of the chunk before lay.
    fresh = (float(forward + made), float(backward + _gradients(p)))
    return LoopCost((forward, backward), flops, moved, length * _rows(p), fresh)


def _wider(p: Program) -> int:
    """Accumulators above the gradients themselves, where they are wider."""
    extra = 0
    for value, need in zip(p.shared, p.shared_needs, strict=True):
        if need:
            extra += math.prod(value.shape) * (p.accumulator_dtype(value.dtype).itemsize - value.dtype.itemsize)
    return extra


def _moved(p: Program, count: int) -> tuple[float, float]:
    """Bytes read and written: whole inputs once per chunk, tokens once, intermediates written and read."""
    weights = float(sum(v.nbytes for v in p.shared)) * count
    tokens = float(sum(v.nbytes for v in (*p.tokens, *p.outputs)))
    inside = [2.0 * x * p.n / p.costs.length for x in p.costs.live]
    return weights + tokens + inside[0], 3 * weights + 2 * tokens + inside[1]


def _gradients(p: Program) -> int:
    values = [v for v, need in zip((*p.tokens, *p.shared), (*p.token_needs, *p.shared_needs), strict=True) if need]
    return sum(v.nbytes for v in values)


def _largest_gradient(p: Program) -> int:
    values = [v for v, need in zip((*p.tokens, *p.shared), (*p.token_needs, *p.shared_needs), strict=True) if need]
    return max((v.nbytes for v in values), default=0)


def _rows(p: Program) -> int:
    """Tokens per index of the axis: the other sequences of the batch."""
    values = [v for v, need in zip(p.tokens, p.token_needs, strict=True) if need] or list(p.tokens)
    counts = [math.prod(v.shape[:-1]) // p.n for v in values if v.cut is not None and v.cut.dim < len(v.shape) - 1]
    return max(min(counts, default=1), 1)


def _chunk_bytes(v: Value, length: int) -> int:
    return math.prod(v.chunk(length)) * v.dtype.itemsize


def _copied(v: Value, length: int) -> int:
    """Bytes of a chunk that must be copied to lie densely."""
    if v.cut is None:
        return 0
    before = v.order[: v.order.index(v.cut.dim)]
    scattered = v.cut.outer > 1 or math.prod(v.shape[d] for d in before) > 1
    return _chunk_bytes(v, length) if scattered else 0
