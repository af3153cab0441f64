"""A planned step, run on this machine: ``python -m mstc.cli.plan.measured JOB FILE``.

In a process of its own; the first step compiles, the others are measured.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mstc.cli.bench.driver import WorkerError, run_module
from mstc.cli.bench.meter import MB, meter_for
from mstc.cli.measured_step import run_step
from mstc.cli.plan.building import build, loss_of
from mstc.cli.plan.models import target_of
from mstc.cli.target import said
from mstc.errors import PlanError

__all__ = ["Run", "measure"]


@dataclass(frozen=True)
class Run:
    """What to run: a model as ``mstc plan --model`` takes it, and the options of the backend."""

    model: str
    tokens: int
    batch: int
    dtype: str
    device: str
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 3


def measure(run: Run) -> tuple[int, float]:
    """Peak bytes above what rests between steps, and median seconds of a step. Raises `PlanError` where it fails."""
    try:
        found = run_module("mstc.cli.plan.measured", asdict(run))
    except WorkerError as e:
        raise PlanError(f"a step of {run.model} with {run.tokens} tokens failed on this machine: {e}") from e
    return int(found["peak"]), float(found["seconds"])


def _measured(run: Run) -> dict[str, float]:
    torch.manual_seed(0)
    function, inputs = _made(run)
    compiled = torch.compile(function, backend="mstc", options=run.options)
    call = (compiled, tuple(inputs))
    run_step(call)
    meter = meter_for(run.device)
    meter.reset()
    seconds = [meter.timed(lambda: run_step(call))[1] for _ in range(run.steps)]
    peak = meter.peak()
    if peak is None:
        raise PlanError("this system does not tell a process's peak memory: measuring needs Linux or a GPU")
    return {"peak": peak * MB, "seconds": statistics.median(seconds)}


def _made(run: Run) -> tuple[Callable[..., Any], Sequence[Any]]:
    """The loss function and its inputs, with random weights and tokens."""
    target, dtype = target_of(run.model, ignore_unknown=True), getattr(torch, run.dtype)
    if target.config is not None:
        model = build(target.config, dtype, device=run.device)
        vocabulary = model.config.get_text_config().vocab_size
        return loss_of(model), [torch.randint(vocabulary, (run.batch, run.tokens), device=run.device)]
    function, inputs = target.made(run.tokens, run.batch, dtype, run.device)
    if target.step is not None:
        owner: Any = getattr(function, "__self__", None)
        for p in owner.parameters() if isinstance(owner, nn.Module) else ():
            nn.init.normal_(p, std=0.02)
    return function, inputs


def main() -> None:
    try:
        found = _measured(Run(**json.loads(sys.argv[1])))
    except (RuntimeError, PlanError) as e:
        sys.exit(said(e))
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
