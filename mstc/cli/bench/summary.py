"""Medians of what the workers measured, and ratios of one system to the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from mstc.cli.bench.job import Result
from mstc.cli.bench.systems import INDUCTOR_VARIANTS, SYSTEMS

__all__ = ["Ratio", "Row", "as_data", "ratios_of", "summarize"]


@dataclass(frozen=True)
class Row:
    """One system at one length, over all its runs: medians, and the range of the step times.

    step_s, compile_s in seconds (compile_s None where nothing compiles); peak_mb above rest,
    None where it cannot be measured; loss and grad_norm of the first step, of the first run.
    """

    system: str
    seq: int
    step_s: float
    step_range_s: tuple[float, float]
    compile_s: float | None
    peak_mb: float | None
    tokens_per_s: float
    loss: float
    last_loss: float
    grad_norm: float
    runs: int


@dataclass(frozen=True)
class Ratio:
    """A system's step time, peak and compile time over a baseline's; below 1 the system is better."""

    system: str
    baseline: str
    seq: int
    step: float
    peak: float | None
    compile: float | None


def summarize(results: Sequence[Result]) -> Row:
    """One row from the runs of one system at one length."""
    steps = [seconds for result in results for seconds in result.step_s]
    step_s = median(steps)
    peaks = [result.peak_mb for result in results if result.peak_mb is not None]
    first = results[0]
    compile_s = median(max(0.0, result.first_s - median(result.step_s)) for result in results)
    return Row(
        system=first.system,
        seq=first.seq,
        step_s=step_s,
        step_range_s=(min(steps), max(steps)),
        compile_s=compile_s if SYSTEMS[first.system].compiles else None,
        peak_mb=median(peaks) if peaks else None,
        tokens_per_s=first.tokens / step_s,
        loss=first.losses[0],
        last_loss=first.losses[-1],
        grad_norm=first.grad_norm,
        runs=len(results),
    )


def ratios_of(system: str, rows: Sequence[Row]) -> list[Ratio]:
    """``system`` over every other row of its length, and over the best of the Inductor variants in each figure."""
    ratios: list[Ratio] = []
    for mine in (row for row in rows if row.system == system):
        others = [row for row in rows if row.seq == mine.seq and row.system != system]
        ratios += [_ratio(mine, other) for other in others]
        variants = [row for row in others if row.system in INDUCTOR_VARIANTS]
        if len(variants) > 1:
            ratios.append(_best_ratio([_ratio(mine, row) for row in variants]))
    return ratios


def _ratio(mine: Row, other: Row) -> Ratio:
    step = mine.step_s / other.step_s
    peak, compiling = _over(mine.peak_mb, other.peak_mb), _over(mine.compile_s, other.compile_s)
    return Ratio(mine.system, other.system, mine.seq, step, peak, compiling)


def _best_ratio(ratios: Sequence[Ratio]) -> Ratio:
    """The largest of each ratio: what is left of the lead over the best competitor in that figure."""
    peaks = [ratio.peak for ratio in ratios if ratio.peak is not None]
    compiles = [ratio.compile for ratio in ratios if ratio.compile is not None]
    return Ratio(
        system=ratios[0].system,
        baseline="best Inductor variant",
        seq=ratios[0].seq,
        step=max(ratio.step for ratio in ratios),
        peak=max(peaks, default=None),
        compile=max(compiles, default=None),
    )


def _over(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other


def as_data(rows: Sequence[Row | Ratio]) -> list[dict[str, object]]:
    """The records as JSON types."""
    return [asdict(row) for row in rows]
