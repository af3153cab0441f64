"""What ``mstc plan`` prints and draws."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mstc.cli.console import make_console, make_table
from mstc.cli.plan.answer import Answer
from mstc.cli.plan.sweep import SLOWER, SPARED, Sweep
from mstc.plan.expressions import Costs

__all__ = ["print_answer", "print_assumptions", "print_costs", "print_sweep", "save_plot"]

GIB = 2**30


def print_answer(found: Answer) -> None:
    console = make_console()
    title = f"{found.model} on {found.device.label}"
    columns = ("longest", "in blocks", "at tokens", "peak GiB", "step s", "tokens/s")
    table = make_table(title, "system", *columns)
    for row in found.rows:
        peak = "does not fit" if row.peak is None else _gib(row.peak)
        time = "" if row.seconds is None else _seconds(row.seconds)
        speed = "" if row.seconds is None else f"{row.tokens * found.batch / row.seconds:.0f}"
        in_blocks = "" if row.in_blocks is None else str(row.in_blocks)
        table.add_row(row.system, str(row.longest), in_blocks, str(row.tokens), peak, time, speed)
    console.print(table)
    held = make_table("mstc's peak by category", "category", "GiB")
    for name, size in found.held.items():
        held.add_row(name, _gib(size))
    console.print(held)
    away = f"mstc's plan with offloading, {_gib(found.host)} GiB in host memory"
    for heading, lines in ((f"mstc's plan at {found.tokens} tokens", found.plan), (away, found.plan_offloading)):
        if lines:
            console.print("\n    ".join([f"{heading}:", *lines]), markup=False, highlight=False)
    heading = f"what if: {found.tokens} tokens under other memory budgets"
    what_if = make_table(heading, "peak GiB", "step s", "plan", words=["plan"])
    what_if.show_lines = True
    for line in found.what_if:
        what_if.add_row(_gib(line["peak"]), _seconds(line["seconds"]), "\n".join(line["plan"]))
    console.print(what_if)


def print_sweep(swept: Sweep) -> None:
    console = make_console()
    title = f"mini-sequences at {swept.tokens} tokens"
    table = make_table(title, "mini-sequences", "tokens", "peak GiB", "measured", "step s", "measured", "")
    for i, row in enumerate(swept.rows):
        peak = "" if row.measured_peak is None else _gib(row.measured_peak)
        seconds = "" if row.measured_seconds is None else _seconds(row.measured_seconds)
        best = "optimum" if i == swept.best else ""
        table.add_row(str(row.chunks), str(row.tokens), _gib(row.peak), peak, _seconds(row.seconds), seconds, best)
    console.print(table)
    if all(row.measured_seconds is None for row in swept.rows):
        console.print("not measured: only --device this runs what it predicts", highlight=False)
    means = f"{SPARED:.0%} less memory above the weights, for at most {SLOWER:.0%} more time, as predicted"
    if swept.pays_from is None:
        console.print(f"mini-sequences do not pay at any length ({means})", highlight=False)
    else:
        console.print(f"mini-sequences pay from about {swept.pays_from} tokens on ({means})", highlight=False)


def print_costs(costs: Mapping[str, Costs]) -> None:
    """Of one call of each kind: in B sequences of S tokens, C tokens per chunk, on one of R ranks."""
    console = make_console()
    title = "costs of one call: B sequences of S tokens, C tokens per chunk, on one of R ranks"
    table = make_table(title, "what", "cost", "FLOPs or bytes", words=["cost", "FLOPs or bytes"])
    for label, each in costs.items():
        for i, (name, expression) in enumerate(each.to_dict().items()):
            table.add_row("" if i else label, name, expression, end_section=name == "kept")
    console.print(table, markup=False)


def print_assumptions(found: Answer) -> None:
    console = make_console()
    for assumption in found.assumptions:
        console.print(f"- {assumption}")


def save_plot(found: Answer, swept: Sweep | None, path: Path) -> None:
    """Time against memory budget; of a sweep, time and peak against the number of mini-sequences beside it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2 if swept else 1, squeeze=False, layout="constrained", figsize=(12 if swept else 6, 4.5)
    )
    left = axes[0][0]
    left.plot([w["peak"] / GIB for w in found.what_if], [w["seconds"] for w in found.what_if], marker="o")
    left.set_xlabel("memory budget, GiB")
    left.set_ylabel("predicted step, s")
    left.set_title("time under a memory budget")
    if swept:
        _draw_sweep(axes[0][1], swept)
    figure.suptitle(f"{found.model}, {found.tokens} tokens, {found.device.label}")
    figure.savefig(path)
    pyplot.close(figure)


def _draw_sweep(axes: Any, swept: Sweep) -> None:
    counts = [row.chunks for row in swept.rows]
    axes.set_xscale("log", base=2)
    axes.set_xlabel("mini-sequences")
    axes.set_ylabel("step, s")
    axes.set_title("time and peak against mini-sequences")
    peaks = axes.twinx()
    peaks.set_ylabel("peak, GiB")
    lines = axes.plot(counts, [row.seconds for row in swept.rows], "o-", color="C0", label="step, predicted")
    lines += peaks.plot(counts, [row.peak / GIB for row in swept.rows], "s-", color="C1", label="peak, predicted")
    ran = [row for row in swept.rows if row.measured_seconds is not None and row.measured_peak is not None]
    if ran:
        at = [row.chunks for row in ran]
        lines += axes.plot(
            at, [row.measured_seconds for row in ran], "o--", color="C0", mfc="none", label="step, measured"
        )
        measured = [(row.measured_peak or 0) / GIB for row in ran]
        lines += peaks.plot(at, measured, "s--", color="C1", mfc="none", label="peak, measured")
    axes.set_ylim(bottom=0)
    peaks.set_ylim(bottom=0)
    axes.legend(handles=lines)


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 10 * GIB else f"{size / GIB:.3g}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.3g}"
