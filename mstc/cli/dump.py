"""``mstc dump``: look inside what the backend does with a function, or compare two dumps."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from mstc.cli.arguments import folder_option, mstc_options
from mstc.cli.console import make_console
from mstc.cli.dump_summary import print_difference, print_dump
from mstc.cli.measured_step import measure_steps
from mstc.cli.target import call_of, tracing
from mstc.dump import files
from mstc.dump.coding import to_data
from mstc.dump.diff import Difference, difference
from mstc.dump.explain import explained
from mstc.dump.model import Measured
from mstc.errors import DumpError
from mstc.options import parse_options

__all__ = ["dump"]


@click.command()
@click.argument("target", metavar="FILE.py:FUNCTION", required=False)
@click.option("--options", callback=mstc_options, metavar="JSON", default="{}", help="Options of the backend.")
@click.option("--seq", type=click.IntRange(1), help="Handed to FUNCTION as seq.")
@click.option("--device", metavar="NAME", help='Default device while FUNCTION runs; "meta" holds nothing.')
@folder_option("--out", help="Folder for the page, text and JSON.")
@click.option("--measure", is_flag=True, help="Also run a step of eager and of mstc, and measure its memory.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON rather than a summary.")
@click.option("--diff", nargs=2, type=click.Path(path_type=Path), metavar="A B", help="Compare two dumps instead.")
def dump(
    target: str | None,
    options: dict[str, Any],
    seq: int | None,
    device: str | None,
    out: Path | None,
    measure: bool,
    as_json: bool,
    diff: tuple[Path, Path] | None,
) -> None:
    """Show what the backend would do, compiling and running nothing unless asked to by --measure.

    FUNCTION takes no argument, or seq, and returns the function to look into and its arguments, as in
    "return loss_fn, ids". --out writes report.html, a page that opens from disk.
    """
    if diff is not None:
        if target is not None:
            raise click.UsageError("--diff compares two dumps that exist; give no FILE.py:FUNCTION with it")
        _compare(diff, out, as_json)
        return
    if target is None:
        raise click.UsageError("Missing argument 'FILE.py:FUNCTION'.")
    fn, args = call_of(target, seq, device)
    with tracing(target):
        report, found = explained(fn, args, {}, parse_options(options), _command(target, options, seq, device, measure))
    if measure:
        found = replace(found, measured=_measured(target, seq, device, options))
    if out is not None:
        report.drawing = files.Drawn(found)
        report.save(out)
    if as_json:
        click.echo(json.dumps(to_data(found), default=str))
    else:
        print_dump(found, make_console(), out / files.PAGE if out else None)


def _compare(paths: tuple[Path, Path], out: Path | None, as_json: bool) -> None:
    a, b = (files.read(p) for p in paths)
    found: Difference = difference(a, b, (str(paths[0]), str(paths[1])))
    if out is not None:
        files.Drawn(b, found).save(out)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    else:
        print_difference(found, make_console(), out / files.PAGE if out else None)


def _measured(target: str, seq: int | None, device: str | None, options: dict[str, Any]) -> tuple[Measured, ...]:
    if device == "meta":
        raise DumpError("--measure runs the function, but the meta device holds no numbers: give another --device")
    with make_console(stderr=True).status("measuring a step of eager, then of mstc"):
        return measure_steps(target, seq, device, options)


def _command(target: str, options: dict[str, Any], seq: int | None, device: str | None, measure: bool) -> str:
    """The command that gives this dump again."""
    words = ["mstc", "dump", target]
    if options:
        words += ["--options", json.dumps(options)]
    if seq is not None:
        words += ["--seq", str(seq)]
    if device is not None:
        words += ["--device", device]
    words += ["--measure"] * measure
    return shlex.join([*words, "--out", "dump"])
