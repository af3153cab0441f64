"""``mstc plan``: the longest sequence, the peak, the time of a step and the plan, without weights and without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch

from mstc.cli.arguments import file_option
from mstc.cli.console import make_console, make_progress, make_table
from mstc.cli.plan.answer import Answer, answer, steps_of
from mstc.cli.plan.models import SHIPPED, target_of
from mstc.cli.plan.optimizers import OPTIMIZERS
from mstc.cli.plan.setting import Setting
from mstc.cli.plan.sweep import sweep_chunks
from mstc.plan.devices import device as device_of
from mstc.plan.devices import names

__all__ = ["plan"]

GIB = 2**30
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@click.command()
@click.option(
    "--model",
    required=True,
    metavar="NAME",
    help=f"{', '.join(SHIPPED)}, FILE.py:FUNCTION, or the path of a Hugging Face config.json.",
)
@click.option("--device", "device_name", required=True, metavar="NAME", help=f"{', '.join(names())}.")
@click.option("--seq", type=click.IntRange(1), help="Tokens per sequence; without it each system's own longest.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--optimizer", type=click.Choice(list(OPTIMIZERS)), default="adamw-bf16", show_default=True)
@click.option("--sweep", type=click.Choice(["chunks"]), help="Time and peak against the number of mini-sequences.")
@file_option("--plot", help="PNG of time against memory budget.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    model: str,
    device_name: str,
    seq: int | None,
    batch: int,
    dtype: str,
    optimizer: str,
    sweep: str | None,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Tell what a training step will need and take, side by side with other ways to run it.

    FUNCTION is as for mstc dump: it takes seq, and returns the loss function and its arguments. It runs with
    meta as the default device, so nothing is held; --batch and --dtype are its own matter.
    """
    if ".py:" in model and (batch != 1 or dtype != "bfloat16"):
        raise click.UsageError("--batch and --dtype are of configurations; FILE.py:FUNCTION sets both itself")
    target = target_of(model)
    setting = Setting(device_of(device_name), batch, DTYPES[dtype], OPTIMIZERS[optimizer])
    with make_progress(make_console(stderr=True)) as progress:
        task = progress.add_task("", total=steps_of(target), completed=-1)

        def tell(doing: str) -> None:
            progress.update(task, description=doing, advance=1)

        found = answer(target, setting, seq, tell)
    swept = sweep_chunks(found.planned, found.tokens) if sweep else []
    if plot is not None:
        _plot(found, plot)
    if as_json:
        click.echo(json.dumps({**found.to_dict(), "sweep": swept}, indent=2))
    else:
        _print(found, swept)


def _print(found: Answer, swept: list[dict[str, Any]]) -> None:
    console = make_console()
    table = make_table(
        f"{found.model} on {found.device.label}",
        "system",
        "longest",
        "in blocks",
        "at tokens",
        "peak GiB",
        "step s",
        "tokens/s",
    )
    for row in found.rows:
        peak = "does not fit" if row.peak is None else f"{row.peak / GIB:.1f}"
        time = "" if row.seconds is None else f"{row.seconds:.1f}"
        speed = "" if row.seconds is None else f"{row.tokens * found.batch / row.seconds:.0f}"
        in_blocks = "" if row.in_blocks is None else str(row.in_blocks)
        table.add_row(row.system, str(row.longest), in_blocks, str(row.tokens), peak, time, speed)
    console.print(table)
    held = make_table("mstc's peak by category", "category", "GiB")
    for name, size in found.held.items():
        held.add_row(name, f"{size / GIB:.2f}")
    console.print(held)
    away = f"mstc's plan with offloading, {found.host / GIB:.1f} GiB in host memory"
    for title, lines in ((f"mstc's plan at {found.tokens} tokens", found.plan), (away, found.plan_offloading)):
        if lines:
            console.print("\n    ".join([f"{title}:", *lines]), markup=False, highlight=False)
    title = f"what if: {found.tokens} tokens under other memory budgets"
    what_if = make_table(title, "peak GiB", "step s", "plan", words=["plan"])
    what_if.show_lines = True
    for line in found.what_if:
        what_if.add_row(f"{line['peak'] / GIB:.1f}", f"{line['seconds']:.1f}", "\n".join(line["plan"]))
    console.print(what_if)
    if swept:
        table = make_table("mini-sequences (predicted)", "tokens per chunk", "peak GiB", "step s")
        for line in swept:
            table.add_row(str(line["chunk"]), f"{line['peak'] / GIB:.2f}", f"{line['seconds']:.2f}")
        console.print(table)
    for assumption in found.assumptions:
        console.print(f"- {assumption}")


def _plot(found: Answer, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots()
    axes.plot([w["peak"] / GIB for w in found.what_if], [w["seconds"] for w in found.what_if], marker="o")
    axes.set_xlabel("memory budget, GiB")
    axes.set_ylabel("predicted step, s")
    axes.set_title(f"{found.model}, {found.tokens} tokens, {found.device.label}")
    figure.savefig(path)
