"""Time and peak against the number of mini-sequences, with nothing else chosen: predicted, and measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mstc.cli.plan.draft import Planned
from mstc.cli.plan.measured import Run, measure
from mstc.plan.solve import peak_of
from mstc.plan.stages import Levers, Option, Stage

__all__ = ["Row", "Sweep", "measured", "sweep_chunks"]

ALONE = Levers(recompute=False, attention=False, pruned=False)
# Chunks pay where they spare a twentieth of what a step holds besides weights, for at most a fiftieth more time.
SPARED, SLOWER = 0.05, 0.02
SHORTEST, LONGEST = 256, 1 << 20  # tokens between which the length is sought from which on they do


@dataclass(frozen=True)
class Row:
    """Loops in ``chunks`` mini-sequences of at most ``tokens`` tokens: peak in bytes, seconds of a step."""

    chunks: int
    tokens: int
    peak: int
    seconds: float
    measured_peak: int | None = None
    measured_seconds: float | None = None


@dataclass(frozen=True)
class Sweep:
    """best: the position of the row of least time among those that fit (the best measured one, where any was), None
    where none does; pays_from: tokens per sequence from which on mini-sequences pay, None where they never do."""

    tokens: int
    rows: tuple[Row, ...]
    best: int | None
    pays_from: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def sweep_chunks(planned: Planned, tokens: int) -> Sweep:
    """Every number of mini-sequences: what is inside of them runs again in the backward, and all else is kept. One
    mini-sequence is the model as it is: its backward repeats no product."""
    rows = _rows(planned, tokens)
    return Sweep(tokens, rows, _best(rows, planned.device.usable()), _pays_from(planned))


def measured(sweep: Sweep, planned: Planned, run: Run, tell: Callable[[str], None]) -> Sweep:
    """With those rows measured that fit; ``tell`` hears of each before it runs."""
    rows = []
    for row in sweep.rows:
        if row.peak <= planned.device.usable():
            tell(f"measuring {row.chunks} mini-sequences")
            whole = row.chunks == 1
            chunks = {"chunk_tokens": row.tokens}
            options = {"mini_sequence": not whole and chunks, "lm_head": not whole and chunks, "recompute": False}
            peak, seconds = measure(replace(run, options=options))
            row = replace(row, measured_peak=planned.parameters + planned.state + peak, measured_seconds=seconds)
        rows.append(row)
    return replace(sweep, rows=tuple(rows), best=_best(rows, planned.device.usable()))


def _rows(planned: Planned, tokens: int) -> tuple[Row, ...]:
    stages = planned.stages(tokens, ALONE)
    levels = max(len(_counts(stage)) for stage in stages)
    return tuple(_row(planned, tokens, stages, level) for level in range(levels))


def _row(planned: Planned, tokens: int, stages: Sequence[Stage], level: int) -> Row:
    options = [_at_level(stage, level) for stage in stages]
    most = max(max(o.choice.counts, default=1) for o in options)
    return Row(most, -(-tokens // most), peak_of(stages, options, planned.resident), sum(o.seconds for o in options))


def _counts(stage: Stage) -> list[tuple[int, ...]]:
    return sorted({o.choice.counts for o in stage.options})


def _at_level(stage: Stage, level: int) -> Option:
    """The stage's option with its ``level``-th number of chunks, or its last where it has fewer."""
    counts = _counts(stage)
    wanted = counts[min(level, len(counts) - 1)]
    found = [o for o in stage.options if o.choice.counts == wanted]
    return (min if level else max)(found, key=lambda o: o.choice.saves)


def _best(rows: Sequence[Row], budget: int) -> int | None:
    fitting = [i for i, row in enumerate(rows) if row.peak <= budget]
    tried = [i for i in fitting if rows[i].measured_seconds is not None]
    if tried:
        return min(tried, key=lambda i: (rows[i].measured_seconds, rows[i].peak))
    return min(fitting, key=lambda i: (rows[i].seconds, rows[i].peak), default=None)


def _pays_from(planned: Planned) -> int | None:
    high = SHORTEST
    while not _pay(planned, high):
        high *= 2
        if high > LONGEST:
            return None
    low = high // 2
    while high > SHORTEST and high - low > SHORTEST:
        middle = (low + high) // 2
        low, high = (low, middle) if _pay(planned, middle) else (middle, high)
    return high


def _pay(planned: Planned, tokens: int) -> bool:
    whole, *cut = _rows(planned, tokens)
    enough = (1 - SPARED) * (whole.peak - planned.resident)
    return any(r.peak - planned.resident <= enough and r.seconds <= (1 + SLOWER) * whole.seconds for r in cut)
