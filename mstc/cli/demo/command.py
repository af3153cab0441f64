"""``mstc demo``: a small Llama learns from long text under eager, Inductor and mstc, side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mstc.cli.arguments import folder_option, mstc_options, names_option
from mstc.cli.bench.driver import WorkerError, run_job
from mstc.cli.bench.job import Event, Job, Result
from mstc.cli.bench.summary import as_data, ratios_of, summarize
from mstc.cli.bench.systems import SYSTEMS
from mstc.cli.bench.table import ratio_table
from mstc.cli.console import make_console, make_table, number
from mstc.cli.demo.plot import save_plot
from mstc.cli.environment import available_cores, describe_machine, describe_versions

__all__ = ["demo"]

_SYSTEMS = ("eager", "inductor", "mstc")
_LEARNING_RATE = 3e-3


@click.command()
@click.option("--steps", type=click.IntRange(2), default=10, show_default=True, help="Training steps.")
@click.option("--seq", type=click.IntRange(16), default=8192, show_default=True, help="Bytes per sequence.")
@names_option("--systems", _SYSTEMS, _SYSTEMS, show_default=True, help="Which of them to train under.")
@click.option("--model", type=click.Choice(["llama-bytes", "llama-tiny"]), default="llama-bytes", show_default=True)
@folder_option("--out", default="demo_output", show_default=True, help="Folder for demo.png and demo.json.")
@click.option("--options", callback=mstc_options, metavar="JSON", default="{}", help="Options for mstc.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON rather than tables.")
def demo(
    steps: int, seq: int, systems: tuple[str, ...], model: str, out: Path, options: dict[str, Any], as_json: bool
) -> None:
    """Train a byte-level Llama on Python's own source files under each system, on the same batches.

    Each system runs in a process of its own and compiles as on a fresh machine. Ends with a table, and
    writes demo.png and demo.json to the output folder.
    """
    jobs = [
        Job(
            system=system,
            model=model,
            seq=seq,
            steps=steps - 1,
            threads=available_cores(),
            text=True,
            learning_rate=_LEARNING_RATE,
            options=options if system == "mstc" else {},
        )
        for system in systems
    ]
    console = make_console()
    results = _train(jobs, make_console(stderr=True) if as_json else console)
    report = json.dumps(_report(results), indent=2)
    (out / "demo.json").write_text(report + "\n", encoding="utf-8")
    save_plot(results, out / "demo.png")
    if as_json:
        click.echo(report)
    else:
        _print(results, console)
        console.print(f"plot: {out / 'demo.png'}", markup=False)


def _train(jobs: Sequence[Job], console: Console) -> list[Result]:
    """Run the jobs one after another under a progress bar; without a terminal, a line per step."""
    columns = (TextColumn("{task.description:<52}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        return [_train_one(job, progress, console) for job in jobs]


def _train_one(job: Job, progress: Progress, console: Console) -> Result:
    about = SYSTEMS[job.system].about
    waiting = "compiling" if SYSTEMS[job.system].compiles else "starting"
    task = progress.add_task(f"{about}: {waiting} ...", total=job.steps + 1)
    if not console.is_terminal:
        console.print(f"{about}: {waiting} ...", markup=False, highlight=False)

    def show(event: Event) -> None:
        text = f"{about}: step {event.step + 1}, loss {event.loss:.3f}, {event.seconds:.1f} s"
        progress.update(task, advance=1, description=text)
        if not console.is_terminal:
            console.print(text, markup=False, highlight=False)

    try:
        return run_job(job, show, caches="empty")
    except WorkerError as error:
        raise click.ClickException(str(error)) from error


def _report(results: Sequence[Result]) -> dict[str, object]:
    rows = [summarize([result]) for result in results]
    return {
        "versions": describe_versions(),
        "machine": describe_machine(),
        "rows": as_data(rows),
        "ratios": as_data(ratios_of("mstc", rows)),
        "losses": {result.system: result.losses for result in results},
    }


def _print(results: Sequence[Result], console: Console) -> None:
    rows = [summarize([result]) for result in results]
    console.print(_loss_table(results))
    columns = ("system", "peak MB above rest", "tokens/s", "step s", "compile s", "last loss")
    table = make_table(f"{results[0].seq} tokens per step", *columns)
    for row in rows:
        cells = (number(row.peak_mb, 0), number(row.tokens_per_s, 0), number(row.step_s, 2))
        table.add_row(
            SYSTEMS[row.system].about, *cells, number(row.compile_s, 1, missing="-"), number(row.last_loss, 5)
        )
    console.print(table)
    if ratios := ratios_of("mstc", rows):
        console.print(ratio_table("mstc", ratios))


def _loss_table(results: Sequence[Result]) -> Table:
    """A row per step, a column per system: the same numbers, up to rounding."""
    table = make_table("loss", "step", *(SYSTEMS[result.system].about for result in results))
    for step, losses in enumerate(zip(*(result.losses for result in results), strict=True), start=1):
        table.add_row(str(step), *(number(loss, 5) for loss in losses))
    return table
