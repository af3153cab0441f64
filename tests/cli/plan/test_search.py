"""The longest sequence is found in few trials."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from mstc.cli.plan.search import last_that_fits

GROWING: dict[str, Callable[[int], float]] = {
    "linear": lambda n: n,
    "in steps": lambda n: n - n % 3000,
    "rough": lambda n: n + 700 * (n // 1024 % 2),
    "scores of all pairs": lambda n: n + n * n / 1e4,
    "slowing": lambda n: 1e3 * n**0.5,
}


@pytest.mark.parametrize("kind", list(GROWING))
@pytest.mark.parametrize("last", [1024, 3072, 98304, 99328, 7777280])
def test_the_last_length_that_fits(kind: str, last: int) -> None:
    limit, tried = GROWING[kind](last), []

    def over(tokens: int) -> int:
        tried.append(tokens)
        return math.ceil(GROWING[kind](tokens) - limit)

    found = last_that_fits(over, 1024)
    assert over(found) <= 0 < over(found + 1024)
    assert found >= last and len(tried) <= 16


def test_none_fits() -> None:
    assert last_that_fits(lambda tokens: tokens, 1024) == 0


def test_all_fit() -> None:
    assert last_that_fits(lambda tokens: 0, 1024, most=1 << 20) >= 1 << 20


@pytest.mark.parametrize("plateau", [-1e6, -1, 0])
def test_what_does_not_grow_at_first(plateau: float) -> None:
    """A constant, as of an optimizer's step, hides what tokens add."""
    tried: list[int] = []

    def over(tokens: int) -> int:
        tried.append(tokens)
        return int(max(plateau, 600 * (tokens - 100_000)))

    found = last_that_fits(over, 256)
    assert over(found) <= 0 < over(found + 256)
    assert len(tried) < 40
