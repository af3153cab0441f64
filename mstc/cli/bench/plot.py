"""The benchmark's picture: step time and peak memory, as bars at one length, as lines over several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mstc.cli.bench.summary import Row
from mstc.cli.bench.systems import SYSTEMS

__all__ = ["save_plot"]


def save_plot(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: on the left seconds per step, on the right the peak above rest in MB, where it was measured."""
    import matplotlib as mpl  # the only part of the benchmark that needs it

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    _draw(time, "step, s", [(row, row.step_s) for row in rows])
    _draw(memory, "peak above rest, MB", [(row, row.peak_mb) for row in rows if row.peak_mb is not None])
    figure.suptitle("one training step (medians)")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw(axes: Any, what: str, figures: Sequence[tuple[Row, float]]) -> None:
    systems = list(dict.fromkeys(row.system for row, _ in figures))
    lengths = {row.seq for row, _ in figures}
    axes.grid(alpha=0.3)
    if len(lengths) <= 1:
        axes.barh([SYSTEMS[row.system].about for row, _ in figures], [figure for _, figure in figures])
        axes.invert_yaxis()  # the first on top, as in the table
        axes.set(xlabel=what, title="".join(f"{length} tokens" for length in lengths))
        return
    for system in systems:
        points = sorted((row.seq, figure) for row, figure in figures if row.system == system)
        axes.plot(*zip(*points, strict=True), marker="o", label=SYSTEMS[system].about)
    axes.set(xlabel="tokens per sequence", ylabel=what)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [str(n) for n in sorted(lengths)])
    axes.set_ylim(bottom=0)
    axes.legend()
