"""The demo's picture: memory over time, and the loss of each step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from mstc.cli.bench.job import Result
from mstc.cli.bench.systems import SYSTEMS

__all__ = ["save_plot"]

_LINES = ("-", "--", ":", "-.")  # equal losses lie on one another; different dashes keep each to be seen


def save_plot(results: Sequence[Result], path: Path) -> None:
    """Write a PNG: on the left memory above rest (MB) over time, on the right the loss per step."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, loss) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for result, line in zip(results, _LINES * len(results), strict=False):
        about = SYSTEMS[result.system].about
        if result.timeline:
            memory.plot(*zip(*result.timeline, strict=True), label=_memory_label(result), linewidth=1)
        loss.plot(range(1, len(result.losses) + 1), result.losses, line, label=about, linewidth=2)
    memory.set(title="memory while training", xlabel="seconds after compilation", ylabel="MB above rest")
    loss.set(title="loss", xlabel="step", ylabel="nats per byte")
    for axes in (memory, loss):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _memory_label(result: Result) -> str:
    about = SYSTEMS[result.system].about
    return about if result.peak_mb is None else f"{about} (peak {result.peak_mb:.0f} MB)"
