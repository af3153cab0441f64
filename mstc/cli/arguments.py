"""Callbacks that check the arguments which several commands take."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
import torch

from mstc.errors import OptionError
from mstc.options import parse_options

__all__ = ["counts", "device", "file_option", "folder_option", "mstc_options", "names_option"]

Callback = Callable[[click.Context, click.Parameter, str], tuple[str, ...]]
Option = Callable[[Callable[..., Any]], Callable[..., Any]]


def names(allowed: Iterable[str]) -> Callback:
    """A check for names out of ``allowed``, separated by commas; a name given twice counts once."""
    known = tuple(allowed)

    def check(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
        given = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
        for name in given:
            if name not in known:
                raise click.BadParameter(f"'{name}' is none of {', '.join(known)}")
        return given

    return check


def counts(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Whole numbers above 0, separated by commas."""
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"'{value}' must be whole numbers above 0, separated by commas")
    return tuple(dict.fromkeys(int(part) for part in parts))


def mstc_options(ctx: click.Context, param: click.Parameter, value: str) -> dict[str, Any]:
    """Options of the backend as a JSON object, checked as the backend checks them."""
    try:
        options = json.loads(value)
        parse_options(options)
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"not JSON: {error}") from error
    except OptionError as error:
        raise click.BadParameter(str(error)) from error
    return dict(options or {})


def device(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """ "auto" becomes "cuda" where there is one, else "cpu"; CUDA asked for in vain is an error."""
    if value == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if value == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("this torch finds no CUDA device")
    return value


def names_option(flag: str, known: Iterable[str], default: Iterable[str], **settings: Any) -> Option:
    """An option that takes comma-separated names of a list."""
    return click.option(flag, callback=names(known), metavar="NAME,...", default=",".join(default), **settings)


def file_option(flag: str, **settings: Any) -> Option:
    """An option for a file to write."""
    return click.option(flag, callback=file_to_write, type=click.Path(dir_okay=False, path_type=Path), **settings)


def folder_option(flag: str, **settings: Any) -> Option:
    """An option for a folder to write to."""
    return click.option(flag, callback=folder_to_write, type=click.Path(file_okay=False, path_type=Path), **settings)


def folder_to_write(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """A folder that can be written to. It is made now, since what goes into it may take long to get."""
    if value is not None:
        _make(value)
    return value


def file_to_write(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """A file whose folder can be written to; that is made now."""
    if value is not None:
        _make(value.parent)
    return value


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"the folder '{folder}' cannot be made: {error.strerror}; give another") from error
    if not os.access(folder, os.W_OK):
        raise click.BadParameter(f"the folder '{folder}' cannot be written to; give another")
