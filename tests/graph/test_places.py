"""`relocate`: a factor of a dimension seen through another shape is the same set of elements."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mstc.graph.places import Place, relocate
from mstc.ops.body import cut_of


@st.composite
def shapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of as many elements, made of the same factors grouped twice."""
    factors = draw(st.lists(st.sampled_from((1, 2, 2, 3)), min_size=1, max_size=5))

    def grouped() -> list[int]:
        cuts = sorted(draw(st.lists(st.integers(0, len(factors)), max_size=3)))
        return [math.prod(factors[a:b]) for a, b in zip([0, *cuts], [*cuts, len(factors)], strict=True)]

    return grouped(), grouped()


def places(shape: list[int]) -> list[Place]:
    found = []
    for dim, extent in enumerate(shape):
        for n in range(2, extent + 1):
            found += [
                Place(dim, n, outer, extent // n // outer)
                for outer in range(1, extent // n + 1)
                if extent % (n * outer) == 0
            ]
    return found


@given(shapes())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_same_elements(both: tuple[list[int], list[int]]) -> None:
    before, after = both
    x = torch.arange(math.prod(before))
    for place in places(before):
        moved = relocate(place, before, after)
        if moved is None:
            continue
        n = int(place.n)
        assert moved.n == place.n and moved.outer * moved.n * moved.inner == after[moved.dim]
        for start in range(n):
            piece = cut_of(place).read(x.view(before), n, start, 1).flatten()
            assert torch.equal(piece, cut_of(moved).read(x.view(after), n, start, 1).flatten())
        assert relocate(moved, after, before) == place


@given(shapes())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_nothing_is_lost_that_could_be_found(both: tuple[list[int], list[int]]) -> None:
    """Where no place is given, no factor of the new shape holds the same elements in the same order."""
    before, after = both
    x = torch.arange(math.prod(before))
    for place in places(before):
        if relocate(place, before, after) is None:
            wanted = cut_of(place).read(x.view(before), int(place.n), 0, 1).flatten()
            for other in places(after):
                if other.n == place.n:
                    assert not torch.equal(cut_of(other).read(x.view(after), int(other.n), 0, 1).flatten(), wanted)


@pytest.mark.parametrize(
    ("place", "before", "after", "expected"),
    [
        (Place(1, 5), (2, 5, 4), (10, 4), Place(0, 5, 2)),
        (Place(0, 5, 2), (10, 4), (2, 5, 4), Place(1, 5)),
        (Place(0, 2), (2, 5, 4), (10, 4), Place(0, 2, 1, 5)),
        (Place(1, 5), (2, 5, 4), (2, 20), Place(1, 5, 1, 4)),
        (Place(1, 6), (2, 6), (4, 3), None),
        (Place(0, 6), (6,), (2, 3), None),
    ],
)
def test_views_of_tokens(place: Place, before: tuple[int, ...], after: tuple[int, ...], expected: Place | None) -> None:
    assert relocate(place, before, after) == expected
