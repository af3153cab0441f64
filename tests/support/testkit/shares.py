"""Which cases of a large grid run every time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def first_of(names: Iterable[str], few: Iterable[str]) -> list[Any]:
    """All names, those beside ``few`` only in the long run."""
    return [n if n in few else pytest.param(n, marks=pytest.mark.slow) for n in names]
