"""The meters: a peak is seen after it is over, and what rests does not count."""

from __future__ import annotations

import time

import torch

from mstc.cli.bench.meter import HostMeter, Timeline, meter_for

BLOCK = 64 << 20  # bytes


def test_host_meter_sees_a_passed_peak_but_not_what_rests() -> None:
    rest = torch.ones(BLOCK, dtype=torch.uint8)
    meter = HostMeter()
    meter.reset()
    torch.ones(BLOCK, dtype=torch.uint8)
    peak = meter.peak()
    assert peak is not None and 60 < peak < 120
    now = meter.now()
    assert now is not None and now < 30
    assert (meter.rest() or 0) > 64 and rest[0] == 1


def test_timed_returns_the_value_and_the_seconds() -> None:
    value, seconds = meter_for("cpu").timed(lambda: time.sleep(0.05) or "done")
    assert value == "done" and 0.05 <= seconds < 5


def test_timeline_keeps_the_highest_of_each_stretch() -> None:
    meter = HostMeter()
    meter.reset()
    with Timeline(meter, period_s=0.001, most=5) as timeline:
        held = torch.ones(BLOCK, dtype=torch.uint8)
        time.sleep(0.1)
    samples = timeline.samples()
    assert 1 <= len(samples) <= 5
    assert max(use for _, use in samples) > 60 and held[0] == 1
