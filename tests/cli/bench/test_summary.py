"""Medians and ratios."""

from __future__ import annotations

import json

import pytest

from mstc.cli.bench.job import Result
from mstc.cli.bench.summary import as_data, ratios_of, summarize


def result(system: str, steps: list[float], first: float = 10.0, peak: float | None = 100.0, seq: int = 64) -> Result:
    return Result(system, seq, 2 * seq, steps, first, peak, 50.0, [5.0, 4.0], 1.5, [])


def test_summarize_takes_medians_over_runs() -> None:
    row = summarize([result("mstc", [1.0, 2.0], peak=100), result("mstc", [4.0, 3.0], peak=300)])
    assert (row.step_s, row.step_range_s, row.peak_mb, row.runs) == (2.5, (1.0, 4.0), 200, 2)
    assert row.tokens_per_s == pytest.approx(128 / 2.5)
    assert row.compile_s == pytest.approx((8.5 + 6.5) / 2)
    assert (row.loss, row.last_loss, row.grad_norm) == (5.0, 4.0, 1.5)


def test_what_is_not_measured_stays_so() -> None:
    row = summarize([result("eager", [1.0], peak=None)])
    assert row.peak_mb is None and row.compile_s is None
    (ratio,) = ratios_of("mstc", [row, summarize([result("mstc", [0.5])])])
    assert (ratio.step, ratio.peak, ratio.compile) == (0.5, None, None)


def test_ratios_are_per_length_and_to_the_best_inductor_variant() -> None:
    rows = [
        summarize([result("inductor", [4.0], peak=200)]),
        summarize([result("inductor-chunker", [8.0], peak=50)]),
        summarize([result("mstc", [2.0], peak=25)]),
        summarize([result("eager", [1.0], seq=128)]),
        summarize([result("mstc", [3.0], seq=128)]),
    ]
    ratios = {(r.baseline, r.seq): (r.step, r.peak) for r in ratios_of("mstc", rows)}
    assert ratios == {
        ("inductor", 64): (0.5, 0.125),
        ("inductor-chunker", 64): (0.25, 0.5),
        ("best Inductor variant", 64): (0.5, 0.5),
        ("eager", 128): (3.0, 1.0),
    }
    json.dumps(as_data(rows) + as_data(ratios_of("mstc", rows)))


def test_without_the_system_there_are_no_ratios() -> None:
    assert ratios_of("mstc", [summarize([result("eager", [1.0])])]) == []
