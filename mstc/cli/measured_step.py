"""Memory of one step of a user's function, eager and compiled: ``python -m mstc.cli.measured_step JOB FILE``.

Each system runs in a process of its own, twice: the first step compiles, the second is measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mstc.cli.bench.driver import WorkerError, run_module
from mstc.cli.bench.meter import MB, Timeline, meter_for
from mstc.cli.target import Call, call_of, said
from mstc.compat import tree_leaves
from mstc.dump.coding import read_measured
from mstc.dump.model import Measured
from mstc.errors import DumpError

__all__ = ["measure_steps", "run_step"]

SYSTEMS = ("eager", "mstc")


@dataclass(frozen=True)
class _Job:
    target: str
    system: str
    seq: int | None
    device: str | None
    options: dict[str, Any]


def measure_steps(target: str, seq: int | None, device: str | None, options: dict[str, Any]) -> tuple[Measured, ...]:
    """A measured step of FILE.py:FUNCTION for each system. Raises `DumpError` where one fails."""
    return tuple(_run(_Job(target, system, seq, device, options)) for system in SYSTEMS)


def _run(job: _Job) -> Measured:
    try:
        return read_measured(run_module("mstc.cli.measured_step", asdict(job)))
    except WorkerError as e:
        raise DumpError(f"--measure: a step of {job.target} by {job.system} failed: {e}") from e


def _measure(job: _Job) -> Measured:
    fn, args = call_of(job.target, job.seq, job.device)
    if job.system == "mstc":
        fn = torch.compile(fn, backend="mstc", options=job.options)
    device = "cuda" if any(x.is_cuda for x in tree_leaves(args) if isinstance(x, torch.Tensor)) else "cpu"
    run_step((fn, args))
    meter = meter_for(device)
    meter.reset()
    with Timeline(meter, period_s=0.005) as timeline:
        meter.timed(lambda: run_step((fn, args)))
    peak = meter.peak()
    if peak is None:
        raise DumpError("this system does not tell a process's peak memory: --measure needs Linux or a GPU")
    samples = [(s, int(mb * MB)) for s, mb in timeline.samples()]
    return Measured(job.system, device, int(peak * MB), tuple(samples))


def run_step(call: Call) -> None:
    """Forward and, where a result is a scalar with a gradient, backward; the gradients go again."""
    fn, args = call
    results = [x for x in tree_leaves(fn(*args)) if isinstance(x, torch.Tensor)]
    loss = next((x for x in results if x.numel() == 1 and x.requires_grad), None)
    if loss is None:
        return
    leaves = list(_leaves(loss))
    torch.autograd.backward(loss)
    for leaf in leaves:
        leaf.grad = None


def _leaves(result: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors whose gradients a backward from here fills in."""
    stack, seen = [result.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack.extend(after for after, _ in node.next_functions)


def main() -> None:
    job = _Job(**json.loads(sys.argv[1]))
    try:
        measured = _measure(job)
    except RuntimeError as e:
        sys.exit(said(e))
    Path(sys.argv[2]).write_text(json.dumps(asdict(measured)), encoding="utf-8")


if __name__ == "__main__":
    main()
