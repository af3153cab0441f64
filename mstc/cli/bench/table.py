"""Rows and ratios as rich tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from mstc.cli.bench.summary import Ratio, Row
from mstc.cli.bench.systems import SYSTEMS
from mstc.cli.console import make_table, number

__all__ = ["ratio_table", "row_table"]


def row_table(title: str, rows: Sequence[Row]) -> Table:
    """A row per system and length."""
    table = make_table(
        title, "system", "tokens", "step s", "min - max", "tokens/s", "peak MB", "compile s", "loss", "grad norm"
    )
    for row in rows:
        low, high = row.step_range_s
        table.add_row(
            SYSTEMS[row.system].about,
            str(row.seq),
            number(row.step_s, 2),
            f"{low:.2f} - {high:.2f}",
            number(row.tokens_per_s, 0),
            number(row.peak_mb, 0),
            number(row.compile_s, 1, missing="-"),
            number(row.loss, 5),
            number(row.grad_norm, 5),
        )
    return table


def ratio_table(system: str, ratios: Sequence[Ratio]) -> Table:
    """A row per baseline: below 1 the system is better."""
    table = make_table(f"{system} over ...", "baseline", "tokens", "step", "peak", "compile")
    for ratio in ratios:
        about = SYSTEMS[ratio.baseline].about if ratio.baseline in SYSTEMS else ratio.baseline
        figures = (number(ratio.step, 2), number(ratio.peak, 2), number(ratio.compile, 2, missing="-"))
        table.add_row(about, str(ratio.seq), *figures)
    return table
