"""``mstc::delta_rule``: (q, k, v, decay or None, beta), decay and beta per token and head."""

from __future__ import annotations

from mstc.kernels.common.recurrence import Recurrence
from mstc.kernels.common.segments import CHUNK
from mstc.kernels.delta_rule.chunked import BODY

__all__ = ["delta_rule"]


def _flops(key: int, value: int) -> tuple[int, int]:
    """Forward: two pairs, the inverse, W, Y, A u; the transition, its scan; the reads of the state. Backward: the
    forward again without the output, then each product's two gradients.
    """
    inverse = CHUNK * CHUNK // 3
    forward = CHUNK * (6 * key + 4 * value) + inverse + 4 * key * key + 8 * key * value
    return forward, CHUNK * (14 * key + 10 * value) + inverse + 6 * key * key + 22 * key * value


delta_rule = Recurrence("delta_rule", ("q", "k", "v", "decay?", "beta"), (), 3, BODY, _flops).define()
