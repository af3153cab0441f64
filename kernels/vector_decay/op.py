"""``mstc::vector_decay``: (q, k, v, decay, bonus or None) with a log decay per token, head and key channel."""

from __future__ import annotations

from mstc.kernels.common.recurrence import Recurrence
from mstc.kernels.common.segments import CHUNK
from mstc.kernels.vector_decay.chunked import BODY

__all__ = ["vector_decay"]


def _flops(key: int, value: int) -> tuple[int, int]:
    """Forward: the pairs (a triangle), A v, the state's update and its reading. Backward: pairs and gradients
    (triangles), dA, dv, the states, their gradient and dq, dk, dv.
    """
    forward = CHUNK * key + 2 * CHUNK * value + 4 * key * value
    return forward, 3 * CHUNK * key + 4 * CHUNK * value + 10 * key * value


vector_decay = Recurrence("vector_decay", ("q", "k", "v", "decay"), ("bonus?",), 3, BODY, _flops).define()
