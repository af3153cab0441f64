"""Options of the whole test suite."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# How long drawing an example takes tells about the machine, not about what is tested.
settings.register_profile("mstc", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mstc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="Write the golden files anew instead of comparing.")
