"""``mstc bench``: step time, peak memory and compile time of several systems on the same work."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mstc.cli.arguments import counts, device, file_option, mstc_options, names_option
from mstc.cli.bench.driver import WorkerError, run_job
from mstc.cli.bench.job import Job, Result
from mstc.cli.bench.models import MODELS
from mstc.cli.bench.plot import save_plot
from mstc.cli.bench.summary import Row, as_data, ratios_of, summarize
from mstc.cli.bench.systems import DEFAULT, SYSTEMS
from mstc.cli.bench.table import ratio_table, row_table
from mstc.cli.console import make_console, make_progress
from mstc.cli.environment import available_cores, describe_machine, describe_versions

__all__ = ["bench"]


@dataclass
class Runs:
    """What came of the workers: results by (length, system), in the order asked for, and failures by the same."""

    results: dict[tuple[int, str], list[Result]] = field(default_factory=dict)
    failures: dict[tuple[int, str], str] = field(default_factory=dict)


@click.command()
@names_option(
    "--systems",
    SYSTEMS,
    DEFAULT,
    show_default=True,
    help=f"Beside these there are {', '.join(s for s in SYSTEMS if s not in DEFAULT)}.",
)
@click.option(
    "--seq", callback=counts, metavar="INT,...", default="8192", show_default=True, help="Tokens per sequence."
)
@click.option("--layers", type=click.IntRange(1), help="Layers, if not the model's own number.")
@click.option("--rounds", type=click.IntRange(1), default=1, show_default=True, help="Each runs every system once.")
@click.option("--steps", type=click.IntRange(1), default=2, show_default=True, help="Measured steps of a run.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences per step.")
@click.option("--model", type=click.Choice(list(MODELS)), default="llama", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option(
    "--device", callback=device, type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads; all usable cores unless given.")
@click.option("--options", callback=mstc_options, metavar="JSON", default="{}", help="Options for mstc.")
@click.option("--cold", is_flag=True, help="Compile without any cache.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON rather than tables.")
@file_option("--out", help="JSON file to write.")
@file_option("--plot", help="PNG of step times and peaks, over the lengths where there are several.")
def bench(
    systems: tuple[str, ...],
    seq: tuple[int, ...],
    rounds: int,
    options: dict[str, Any],
    cold: bool,
    as_json: bool,
    out: Path | None,
    plot: Path | None,
    threads: int | None,
    **work: Any,
) -> None:
    """Measure training steps (forward and backward) of a model with random weights.

    Every run is a process of its own; the systems take turns in each round. Peak memory is above
    what rests between steps. A system that failed at some length is not tried at longer ones.
    Exit status 1 when a system failed.
    """
    work["threads"] = threads or available_cores()
    jobs = [Job(system=s, seq=n, options=options if s == "mstc" else {}, **work) for n in seq for s in systems]
    console = make_console()
    runs = Runs()

    def report() -> str:
        return json.dumps(_report(runs, jobs, rounds, cold), indent=2)

    for _ in _run_rounds(runs, jobs, rounds, cold, make_console(stderr=True)):
        if out is not None:  # after each run, so that what was measured is there whatever ends the command
            out.write_text(report() + "\n", encoding="utf-8")
    rows = _rows(runs)
    if plot is not None and rows:
        save_plot(rows, plot)
    if as_json:
        click.echo(report())
    else:
        _print(rows, runs.failures, console)
    if runs.failures:
        raise click.exceptions.Exit(1)


def _run_rounds(runs: Runs, jobs: list[Job], rounds: int, cold: bool, console: Console) -> Iterator[Job]:
    """All jobs once per round, so that a slow spell of the machine hits all systems alike; each when it was run."""
    with make_progress(console) as progress:
        task = progress.add_task("", total=rounds * sum(job.steps + 1 for job in jobs))
        for number in range(rounds):
            for job in jobs:
                progress.update(task, description=f"round {number + 1}: {SYSTEMS[job.system].about}, {job.seq} tokens")
                key = (job.seq, job.system)
                shorter = min((n for n, system in runs.failures if system == job.system and n < job.seq), default=None)
                if shorter is not None:
                    runs.failures.setdefault(key, f"{job.system} at {job.seq} tokens: failed at {shorter}, not tried")
                    continue
                try:
                    result = run_job(job, lambda event: progress.advance(task), caches="off" if cold else "kept")
                except WorkerError as error:
                    runs.failures[key] = str(error)
                else:
                    runs.results.setdefault(key, []).append(result)
                yield job


def _rows(runs: Runs) -> list[Row]:
    return [summarize(results) for results in runs.results.values()]


def _report(runs: Runs, jobs: list[Job], rounds: int, cold: bool) -> dict[str, object]:
    rows = _rows(runs)
    return {
        "versions": describe_versions(),
        "machine": describe_machine(),
        "rounds": rounds,
        "cold": cold,
        "jobs": [json.loads(job.to_json()) for job in jobs],
        "rows": as_data(rows),
        "ratios": as_data(ratios_of("mstc", rows)),
        "failures": [
            {"seq": seq, "system": system, "reason": reason} for (seq, system), reason in runs.failures.items()
        ],
        "runs": [
            {"seq": seq, "system": system, "step_s": r.step_s, "first_s": r.first_s, "peak_mb": r.peak_mb}
            for (seq, system), results in runs.results.items()
            for r in results
        ],
    }


def _print(rows: list[Row], failures: Mapping[tuple[int, str], str], console: Console) -> None:
    if rows:
        console.print(row_table("one training step (medians)", rows))
    ratios = ratios_of("mstc", rows)
    if ratios:
        console.print(ratio_table("mstc", ratios))
    for reason in failures.values():
        console.print(f"failed: {reason}", markup=False)
