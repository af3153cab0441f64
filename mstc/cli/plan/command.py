"""``mstc plan``: the longest sequence, the peak, the time of a step and the plan, without weights and without a GPU."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import click
import torch

from mstc.cli.arguments import file_option
from mstc.cli.console import make_console, make_progress
from mstc.cli.plan.answer import answer, steps_of
from mstc.cli.plan.measured import Run
from mstc.cli.plan.models import SHIPPED, target_of
from mstc.cli.plan.optimizers import OPTIMIZERS
from mstc.cli.plan.setting import Setting
from mstc.cli.plan.sweep import measured, sweep_chunks
from mstc.cli.plan.tables import print_answer, print_assumptions, print_costs, print_sweep, save_plot
from mstc.plan.devices import device as device_of
from mstc.plan.devices import names
from mstc.plan.expressions import kinds_of

__all__ = ["plan"]

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
@click.option(
    "--sweep",
    type=click.Choice(["chunks"]),
    help="Time and peak against the number of mini-sequences; with --device this each is measured too.",
)
@click.option("--ignore-unknown", is_flag=True, help="Leave out keys of the configuration that transformers lacks.")
@click.option("--costs", is_flag=True, help="FLOPs and bytes of each kind of loop and attention, as expressions.")
@file_option("--plot", help="PNG of time against memory budget, and of the sweep.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(
    model: str,
    device_name: str,
    seq: int | None,
    batch: int,
    dtype: str,
    optimizer: str,
    sweep: str | None,
    ignore_unknown: bool,
    costs: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Tell what a training step will need and take, side by side with other ways to run it.

    FUNCTION is as for mstc dump: it takes seq, and returns the loss function and its arguments. It runs with
    meta as the default device, so nothing is held; --batch and --dtype are its own matter.
    """
    if ".py:" in model and (batch != 1 or dtype != "bfloat16"):
        raise click.UsageError("--batch and --dtype are of configurations; FILE.py:FUNCTION sets both itself")
    target = target_of(model, ignore_unknown)
    setting = Setting(device_of(device_name), batch, DTYPES[dtype], OPTIMIZERS[optimizer])
    with make_progress(make_console(stderr=True)) as progress, warnings.catch_warnings():
        # Composed ops have no derivative on the meta device; what they are composed of has one.
        warnings.filterwarnings("ignore", message=".*an autograd kernel was not registered", category=UserWarning)
        task = progress.add_task("", total=steps_of(target), completed=-1)

        def tell(doing: str) -> None:
            progress.update(task, description=doing, advance=1)

        found = answer(target, setting, seq, tell)
        swept = None
        if sweep:
            swept = sweep_chunks(found.planned, found.tokens)
            if device_name == "this":
                progress.update(task, total=steps_of(target) + len(swept.rows))
                run = Run(model, found.tokens, batch, dtype, found.device.kind)
                swept = measured(swept, found.planned, run, tell)
    expressions = kinds_of(found.planned.growing, batch) if costs else {}
    if plot is not None:
        save_plot(found, swept, plot)
    if as_json:
        more = {
            "sweep": swept.to_dict() if swept else None,
            "costs": {name: e.to_dict() for name, e in expressions.items()},
        }
        click.echo(json.dumps({**found.to_dict(), **more}, indent=2))
    else:
        print_answer(found)
        if swept:
            print_sweep(swept)
        if expressions:
            print_costs(expressions)
        print_assumptions(found)
