"""``mstc::dplr``: (q, k, v, a, b, decay), all per token and head; decay per key channel."""

from __future__ import annotations

from mstc.kernels.common.recurrence import Recurrence
from mstc.kernels.common.segments import CHUNK
from mstc.kernels.dplr.chunked import BODY

__all__ = ["dplr"]


def _flops(key: int, value: int) -> tuple[int, int]:
    """Forward: four pairs, the inverse, W, Y, A v, A u; the transition, its scan; the reads of the state. Backward: the
    forward again without the output, then each product's two gradients.
    """
    inverse = CHUNK * CHUNK // 3
    forward = CHUNK * (8 * key + 8 * value) + inverse + 4 * key * key + 10 * key * value
    return forward, CHUNK * (18 * key + 18 * value) + inverse + 6 * key * key + 26 * key * value


dplr = Recurrence("dplr", ("q", "k", "v", "a", "b", "decay"), (), 5, BODY, _flops).define()
