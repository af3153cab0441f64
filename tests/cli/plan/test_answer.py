"""The longest sequence of a system, sought by its peak."""

from __future__ import annotations

import pytest

from mstc.cli.plan.answer import FEWEST, GRAIN, longest_in_blocks, longest_of
from mstc.cli.plan.search import MOST


@pytest.mark.parametrize("flat", [0, 900_000, 1_000_000])
@pytest.mark.parametrize("slope", [1, 7, 90, 600])
@pytest.mark.parametrize("base", [0, 300_000])
def test_it_is_the_last_that_fits(flat: int, slope: int, base: int) -> None:
    """Also where a constant, as of an optimizer's step, hides for long what the tokens add."""
    asked: list[int] = []

    def peak(tokens: int) -> int:
        asked.append(tokens)
        return max(flat, base + slope * tokens)

    budget = 1_000_000
    found = longest_of(peak, budget)
    assert found % GRAIN == 0 and peak(found) <= budget
    assert peak(found + GRAIN) > budget
    assert len(asked) < 30


def test_nothing_fits_and_everything_fits() -> None:
    assert longest_of(lambda tokens: tokens, FEWEST - 1) == 0
    assert longest_of(lambda tokens: 5, 10) == MOST


def test_blocks_are_sought_from_above() -> None:
    """What fits is in no order: the longest counts, not the first that fails."""
    assert longest_in_blocks(lambda tokens: tokens != 10 * GRAIN and tokens <= 12 * GRAIN, 20 * GRAIN) == 12 * GRAIN
    assert longest_in_blocks(lambda tokens: True, 1000 * GRAIN) == 1000 * GRAIN
    assert longest_in_blocks(lambda tokens: tokens <= 990 * GRAIN, 1000 * GRAIN) == 985 * GRAIN
    assert longest_in_blocks(lambda tokens: False, 20 * GRAIN) == 0
