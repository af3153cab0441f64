"""Which cases of a large grid run every time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def every(nth: int, cases: Iterable[Any]) -> list[Any]:
    """All cases, only each ``nth`` of them not in the long run alone."""
    return [c if i % nth == 0 else pytest.param(c, marks=pytest.mark.slow) for i, c in enumerate(cases)]


def first_of(names: Iterable[str], few: Iterable[str]) -> list[Any]:
    """All names, those beside ``few`` only in the long run."""
    return [n if n in few else pytest.param(n, marks=pytest.mark.slow) for n in names]
