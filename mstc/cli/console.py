"""Consoles, progress bars, tables and figures, the same in every command."""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["make_console", "make_progress", "make_table", "number"]

_PLAIN_WIDTH = 140  # columns of a table that goes to a file or a pipe


def make_console(*, stderr: bool = False) -> Console:
    """A console that does not squeeze its tables when nobody's terminal sets the width."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_PLAIN_WIDTH)


def make_progress(console: Console) -> Progress:
    """What is done now, a bar, how many of how many, and the time; it goes when all is done.

    Without a terminal nothing is shown.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def make_table(title: str, *columns: str, words: Collection[str] = ()) -> Table:
    """An empty table: names in the first column, words in those that ``words`` names, figures in the others."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column in words else "right")
    return table


def number(value: float | None, digits: int, missing: str = "not measured") -> str:
    """A figure with ``digits`` after the point, or ``missing`` in place of None."""
    return missing if value is None else f"{value:.{digits}f}"
