"""Options of the whole test suite."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Workers side by side share the cores: threads of the one would wait for those of the other.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for what tests start

# How long drawing an example takes tells about the machine, not about what is tested.
settings.register_profile("mstc", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mstc")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="Write the golden files anew instead of comparing.")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Nothing compiled before, and one thread: attention's workspace, and with it the peak, grows with their number."""
    torch._dynamo.reset()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()
