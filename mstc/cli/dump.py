"""``mstc dump``: look inside what the backend does with a function, or compare two dumps."""

from __future__ import annotations

import importlib.util
import inspect
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from mstc.cli.arguments import mstc_options
from mstc.cli.console import make_console
from mstc.cli.dump_summary import print_difference, print_dump
from mstc.dump import files
from mstc.dump.coding import to_data
from mstc.dump.diff import Difference, difference
from mstc.dump.explain import explained
from mstc.dump.model import Dump
from mstc.errors import DumpError, MstcError
from mstc.options import parse_options

__all__ = ["dump"]

Call = tuple[Callable[..., Any], tuple[Any, ...]]


@click.command()
@click.argument("target", metavar="FILE.py:FUNCTION", required=False)
@click.option("--options", callback=mstc_options, metavar="JSON", default="{}", help="Options of the backend.")
@click.option("--seq", type=click.IntRange(1), help="Handed to FUNCTION as seq.")
@click.option("--device", metavar="NAME", help='Default device while FUNCTION runs; "meta" holds nothing.')
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the page, text and JSON.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON rather than a summary.")
@click.option("--diff", nargs=2, type=click.Path(path_type=Path), metavar="A B", help="Compare two dumps instead.")
def dump(
    target: str | None,
    options: dict[str, Any],
    seq: int | None,
    device: str | None,
    out: Path | None,
    as_json: bool,
    diff: tuple[Path, Path] | None,
) -> None:
    """Show what the backend would do, compiling and running nothing.

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
    fn, args = _call_of(target, seq, device)
    report, found = _explain(target, fn, args, options, _command(target, options, seq, device))
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


def _command(target: str, options: dict[str, Any], seq: int | None, device: str | None) -> str:
    """The command that gives this dump again."""
    words = ["mstc", "dump", target]
    if options:
        words += ["--options", json.dumps(options)]
    if seq is not None:
        words += ["--seq", str(seq)]
    if device is not None:
        words += ["--device", device]
    return shlex.join([*words, "--out", "dump"])


# ------------------------------------------------------------------ the user's function


def _explain(
    target: str, fn: Callable[..., Any], args: tuple[Any, ...], options: Any, command: str
) -> tuple[Any, Dump]:
    try:
        return explained(fn, args, {}, parse_options(options), command)
    except MstcError:
        raise
    except Exception as e:
        raise DumpError(f"{target}: the function raised {_said(e)}") from e


def _call_of(target: str, seq: int | None, device: str | None) -> Call:
    """What FUNCTION returns: the function to explain, and its arguments."""
    path, _, name = target.rpartition(":")
    if not path or not name:
        raise DumpError(f"'{target}' must be FILE.py:FUNCTION, for example train.py:loss")
    builder = getattr(_load(Path(path)), name, None)
    if not callable(builder):
        raise DumpError(f"{path} has no function '{name}'")
    given = _given(target, builder, seq)
    try:
        with torch.device(device) if device else nullcontext():
            made = builder(**given)
    except Exception as e:
        raise DumpError(f"{target} raised {_said(e)}") from e
    if not isinstance(made, tuple) or not made or not callable(made[0]):
        raise DumpError(
            f"{target} must return the function to look into and its arguments, as in `return loss_fn, ids`; "
            f"it returned {type(made).__name__}"
        )
    return made[0], made[1:]


def _given(target: str, builder: Callable[..., Any], seq: int | None) -> dict[str, int]:
    parameters = inspect.signature(builder).parameters.values()
    missing = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    takes = any(p.name == "seq" for p in parameters)
    if seq is not None and not takes:
        raise DumpError(f"--seq was given, but {target} takes no argument 'seq'")
    if missing and missing != ["seq"]:
        raise DumpError(f"{target} needs {', '.join(missing)}; it may take seq alone, and must make the rest itself")
    if missing and seq is None:
        raise DumpError(f"{target} takes seq: give --seq")
    return {"seq": seq} if seq is not None else {}


def _load(path: Path) -> Any:
    if not path.is_file():
        raise DumpError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise DumpError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise DumpError(f"{path} raised {_said(e)}") from e
    finally:
        sys.path.remove(str(path.parent))
    return module


def _said(error: Exception) -> str:
    """The error in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
