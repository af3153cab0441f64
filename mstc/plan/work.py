"""What a call costs besides what it reads and makes: temporaries, FLOPs and bytes moved; of a loop, by its bodies.

A body's values are affine in the tokens of a chunk, so what is measured on the body of one length is

    live(t) = fixed + t * per_token,   work(t) = live(t) + what the loop itself holds of a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mstc.ops.body import Value
from mstc.ops.program import Program

# Blocks up to this come from the heap of the C library, which has their pages already (glibc raises its threshold for
# asking the system up to here: DEFAULT_MMAP_THRESHOLD_MAX).
HEAP = 32 * 2**20


@dataclass(frozen=True)
class Cost:
    """Forward and backward of a call. Only loops tell ``rows`` and ``fresh``, and more than one kernel.

    work: temporaries at the peak in bytes; flops; moved: bytes read and written; rows: of one chunk's products;
    fresh: bytes asked of the system; kernels: launched, in all chunks together.
    """

    work: tuple[int, int] = (0, 0)
    flops: tuple[float, float] = (0.0, 0.0)
    moved: tuple[float, float] = (0.0, 0.0)
    rows: float = 0.0
    fresh: tuple[float, float] = (0.0, 0.0)
    kernels: tuple[int, int] = (1, 1)


def loop_cost(p: Program, loss: bool, count: int) -> Cost:
    """The costs of a loop program in ``count`` chunks, read off its bodies and `mstc.ops.loop`."""
    length = -(-p.n // count)
    live = [x * length // p.costs.length for x in p.costs.held(count)]
    # A chunk's temporaries lie where those of the chunk before lay; small ones on the heap.
    asked = [x if y * length // p.costs.length > HEAP else 0 for x, y in zip(live, p.costs.largest, strict=True)]
    pieces = sum(copied(v, length, p.n) for v in p.tokens)
    results = sum(chunk_bytes(v, length) for v in p.outputs) + sum(v.nbytes for v in p.sums)
    held = results if count > 1 else 0  # the chunk before is dropped after the next has run
    forward = live[0] + held + pieces
    backward = 0
    if p.backward is not None:
        b = p.backward
        incoming = sum(copied(p.outputs[i], length, p.n) for i in b.grads if i < len(p.outputs))
        kept = sum(copied(p.outputs[i], length, p.n) for i in b.kept)
        backward = live[1] + pieces + incoming + kept + _wider(p)
    flops = p.flops()
    moved = _moved(p, count)
    kernels = (p.costs.kernels[0] * count, p.costs.kernels[1] * count)
    made, gradients = [v.nbytes for v in p.outputs], _gradients(p)
    if loss and p.backward is not None:
        # Forward and gradients in one; the backward scales them.
        moved = (moved[0] + moved[1], 2.0 * sum(gradients))
        work, fresh = (backward, max(gradients, default=0)), (asked[1] + _new(*made, *gradients), 0.0)
        return Cost(work, (flops[1], 0.0), moved, length * _rows(p), fresh, (kernels[1], 1))
    fresh = (asked[0] + _new(*made), asked[1] + _new(*gradients))
    return Cost((forward, backward), flops, moved, length * _rows(p), fresh, kernels)


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
    inside = [2.0 * x * p.n / p.costs.length for x in p.costs.held(count)]
    return weights + tokens + inside[0], 3 * weights + 2 * tokens + inside[1]


def _new(*blocks: int) -> float:
    """Bytes of the blocks that are asked of the system."""
    return float(sum(b for b in blocks if b > HEAP))


def _gradients(p: Program) -> list[int]:
    """Bytes of each gradient."""
    needs = zip((*p.tokens, *p.shared), (*p.token_needs, *p.shared_needs), strict=True)
    return [v.nbytes for v, need in needs if need]


def _rows(p: Program) -> int:
    """Tokens per index of the axis: the other sequences of the batch."""
    values = [v for v, need in zip(p.tokens, p.token_needs, strict=True) if need] or list(p.tokens)
    counts = [math.prod(v.shape[:-1]) // p.n for v in values if v.cut is not None and v.cut.dim < len(v.shape) - 1]
    return max(min(counts, default=1), 1)


def chunk_bytes(v: Value, length: int) -> int:
    return math.prod(v.chunk(length)) * v.dtype.itemsize


def copied(v: Value, length: int, n: int) -> int:
    """Bytes of a chunk that must be copied to lie densely; the only chunk is the value itself."""
    if v.cut is None or length == n:
        return 0
    before = v.order[: v.order.index(v.cut.dim)]
    scattered = v.cut.outer > 1 or math.prod(v.shape[d] for d in before) > 1
    return chunk_bytes(v, length) if scattered else 0
