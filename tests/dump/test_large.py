"""Llama-3-8B at 131072 tokens is explained on a laptop: time, memory and size of the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mstc.dump import files


def test_llama_3_8b(llama: tuple[Path, dict[str, Any]]) -> None:
    folder, found = llama
    # Time of the process's own work, so that what else runs on the machine does not matter.
    assert found["seconds"] < 20 and found["gib"] < 2, found
    assert found["loops"] == 65
    assert (folder / "report.html").stat().st_size < 3_000_000
    (graph,) = files.read(folder).graphs
    (fold,) = graph.folds
    assert (fold.period, fold.count) == (3, 32) and len(graph.first) > 2000
    assert graph.after.peak < graph.before.peak / 5
