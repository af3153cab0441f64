"""``mstc::scalar_decay``: (q, k, v, decay or None) with a log decay per token and head."""

from __future__ import annotations

from mstc.kernels.common.recurrence import Recurrence
from mstc.kernels.common.segments import CHUNK
from mstc.kernels.scalar_decay.chunked import BODY

__all__ = ["scalar_decay"]


def _flops(key: int, value: int) -> tuple[int, int]:
    """Forward: q k^T and A v over a chunk, the state's update and its reading. Backward: five products over a chunk,
    the states again, their gradient, and dq, dk, dv from them.
    """
    return 2 * CHUNK * (key + value) + 4 * key * value, 2 * CHUNK * (3 * key + 2 * value) + 10 * key * value


scalar_decay = Recurrence("scalar_decay", ("q", "k", "v", "decay?"), (), 3, BODY, _flops).define()
