"""Peak memory and time of heads: one forward and backward, each system in a process of its own.

    python -m mstc.cli.heads.memory --systems mstc,linear_ce --programs mean,z_loss --out heads.json

Beside the peak stands what must be held: the gradients that are asked for, and the float32 logits of 512 tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import click
import torch

from mstc.cli.arguments import file_option, names_option
from mstc.cli.bench.driver import worker_environment
from mstc.cli.bench.meter import MB, meter_for
from mstc.cli.console import make_console, make_progress, make_table, number
from mstc.cli.environment import describe_machine, describe_versions
from mstc.cli.heads.programs import LEAVES, PROGRAMS, make_inputs, scalar_of
from mstc.cli.heads.systems import SYSTEMS

__all__ = ["Job", "Measured", "measure", "memory"]

HELD_TOKENS = 512


class Work(TypedDict):
    """What all systems are given alike: hidden states [1, tokens, width], a head of ``classes``; measured steps."""

    tokens: int
    width: int
    classes: int
    steps: int
    dtype: str


@dataclass(frozen=True)
class Job:
    """One program on one system; chunk: tokens per chunk, of systems that must be told, else as they choose."""

    system: str
    program: str
    tokens: int
    width: int
    classes: int
    steps: int
    dtype: str = "float32"
    chunk: int | None = None


@dataclass(frozen=True)
class Measured:
    """step_s: each step after the first; peak_mb: above what rests; held_mb: what must be held; loss: of the first."""

    job: Job
    step_s: list[float]
    first_s: float
    peak_mb: float | None
    held_mb: float
    loss: float


def measure(job: Job) -> Measured:
    """Run the job in this process; the first step compiles and is measured apart."""
    inputs = make_inputs(1, job.tokens, job.width, job.classes, getattr(torch, job.dtype))
    meter, leaves = meter_for("cpu"), [getattr(inputs, n) for n in LEAVES]
    run = SYSTEMS[job.system].form(job.program, job.chunk)
    if run is None:
        raise SystemExit(f"{job.system} has no form of {job.program}")

    def step() -> float:
        total = scalar_of(run(inputs))
        torch.autograd.backward(total)
        return float(total.detach())

    loss, first = meter.timed(step)
    gradients = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    seconds: list[float] = []
    for _ in range(job.steps):
        for leaf in leaves:
            leaf.grad = None
        if not seconds:
            meter.reset()
        seconds.append(meter.timed(step)[1])
    held = gradients + HELD_TOKENS * job.classes * 4
    return Measured(job, seconds, first, meter.peak(), held / MB, loss)


def _measure_apart(job: Job) -> Measured | str:
    """The same in a fresh process; its last line of error where it fails."""
    command = [sys.executable, "-m", "mstc.cli.heads.memory", "--worker", json.dumps(asdict(job))]
    done = subprocess.run(command, capture_output=True, text=True, env=worker_environment("kept"), check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RECORD "):
            record = json.loads(line[7:])
            return Measured(Job(**record.pop("job")), **record)
    printed = [line for line in done.stderr.splitlines() if line.strip()]
    return f"killed by signal {-done.returncode}" if done.returncode < 0 else printed[-1] if printed else "no result"


@click.command()
@names_option("--systems", SYSTEMS, ("eager", "mstc", "linear_ce", "auto_chunker"))
@names_option("--programs", PROGRAMS, ("mean",), show_default=True)
@click.option("--tokens", type=click.IntRange(1), default=8192, show_default=True)
@click.option("--width", type=click.IntRange(1), default=512, show_default=True)
@click.option("--classes", type=click.IntRange(2), default=128000, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=1, show_default=True, help="Measured steps.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@file_option("--out", help="JSON file to write.")
@click.option("--worker", hidden=True, help="Measure this job, as JSON, in this process.")
def memory(
    systems: tuple[str, ...], programs: tuple[str, ...], out: Path | None, worker: str | None, **work: Unpack[Work]
) -> None:
    """Measure heads; exit status 1 when a system failed on one."""
    if worker is not None:
        click.echo("RECORD " + json.dumps(asdict(measure(Job(**json.loads(worker))))))
        return
    jobs = [Job(system=s, program=p, **work) for p in programs for s in systems]
    done: list[Measured] = []
    failures: list[dict[str, str]] = []
    with make_progress(make_console(stderr=True)) as progress:
        task = progress.add_task("", total=len(jobs))
        for job in jobs:
            progress.update(task, description=f"{job.program}: {SYSTEMS[job.system].about}")
            found = _measure_apart(job)
            if isinstance(found, str):
                failures.append({"system": job.system, "program": job.program, "reason": found})
            else:
                done.append(found)
            _write(out, done, failures)
            progress.advance(task)
    _print(done, failures)
    if failures:
        raise click.exceptions.Exit(1)


def _write(out: Path | None, done: list[Measured], failures: list[dict[str, str]]) -> None:
    """What there is so far: a long run that is stopped leaves what it measured."""
    if out is not None:
        about = {"versions": describe_versions(), "machine": describe_machine()}
        report = {**about, "measured": [asdict(m) for m in done], "failures": failures}
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _print(done: list[Measured], failures: list[dict[str, str]]) -> None:
    table = make_table(
        "head and loss, forward and backward", "program", "system", "step s", "peak MB", "held MB", "ratio"
    )
    for m in done:
        ratio = None if m.peak_mb is None else m.peak_mb / m.held_mb
        row = (number(min(m.step_s), 2), number(m.peak_mb, 0), number(m.held_mb, 0), number(ratio, 2))
        table.add_row(PROGRAMS[m.job.program].about, SYSTEMS[m.job.system].about, *row)
    console = make_console()
    console.print(table)
    for f in failures:
        console.print(f"failed: {f['program']} on {f['system']}: {f['reason']}", markup=False)


if __name__ == "__main__":
    memory()
