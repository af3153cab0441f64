"""What a step really holds: the events of the allocator, as the profiler hands them on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile

import mstc

__all__ = ["measured_peak", "predicted_mib"]


def measured_peak(step: Callable[[], Any], model: nn.Module) -> int:
    """The most bytes of a step that was compiled before, the model's own included."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        step()
    assert run.profiler is not None
    found = run.profiler.kineto_results.events()
    events = sorted((e.start_ns(), e.nbytes()) for e in found if e.name() == "[memory]")
    now = peak = 0
    for _, size in events:
        now += size
        peak = max(peak, now)
    assert events, "the profiler saw no allocation"
    return peak + sum(x.nbytes for x in (*model.parameters(), *model.buffers()))


def predicted_mib() -> float:
    """The peak in MiB that the plan of the newest report tells."""
    line = next(line for line in mstc.reports()[-1].plan if "predicted peak" in line)
    return float(line.split("predicted peak ")[1].split(" MiB")[0])
