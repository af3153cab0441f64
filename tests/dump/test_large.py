"""Llama-3-8B at 131072 tokens is explained on a laptop: memory, size of the page and, on an idle machine, time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mstc.dump import files


def test_llama_3_8b(llama: tuple[Path, dict[str, Any]]) -> None:
    folder, found = llama
    assert found["gib"] < 2, found
    assert found["loops"] == 65
    assert (folder / "report.html").stat().st_size < 3_000_000
    (graph,) = files.read(folder).graphs
    (fold,) = graph.folds
    assert (fold.period, fold.count) == (3, 32) and len(graph.first) > 2000
    assert graph.after.peak < graph.before.peak / 5


@pytest.mark.slow
def test_the_time_it_takes(llama: tuple[Path, dict[str, Any]]) -> None:
    """Seconds of the process's own work. A timed test belongs on an idle machine."""
    assert llama[1]["seconds"] < 20, llama[1]
