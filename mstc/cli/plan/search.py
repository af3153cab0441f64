"""The longest sequence that fits, in few trials: what a step needs grows about linearly with its tokens."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["MOST", "last_that_fits"]

MOST = 1 << 26  # tokens up to which lengths are sought
AT_ENDS = 4  # lines that lead nowhere, after which only halving is left


def last_that_fits(over: Callable[[int], int], grain: int, most: int = MOST) -> int:
    """The last multiple of ``grain``, up to ``most``, at which ``over`` is not positive; 0 where it is from the first.

    over: bytes that so many tokens need above what there is; it must not fall. Sought where a line through the ends
    crosses zero, which finds it where growth is linear; halfway where the same end has moved twice in a row, lest it
    creep, and from then on where `AT_ENDS` lines crossed zero at an end (what grows in steps, or not at all at first).
    """
    ends, values = [0, 8 * grain], [-1, over(8 * grain)]
    while values[1] <= 0:
        if ends[1] >= most:
            return most
        ends, values = [ends[1], 4 * ends[1]], [values[1], over(4 * ends[1])]
    moved: list[int] = []  # 0: the lower end, 1: the upper one
    at_ends = 0
    while ends[1] - ends[0] > grain:
        halves = not ends[0] or at_ends >= AT_ENDS or moved[-2:] in ([0, 0], [1, 1])
        part = 0.5 if halves else values[0] / (values[0] - values[1])
        crossing = int(ends[0] + part * (ends[1] - ends[0])) // grain * grain
        middle = min(max(crossing, ends[0] + grain), ends[1] - grain)
        at_ends += middle != crossing
        found = over(middle)
        moved.append(0 if found <= 0 else 1)
        ends[moved[-1]], values[moved[-1]] = middle, found
    return ends[0]
