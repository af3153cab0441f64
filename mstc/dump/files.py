"""The files of a dump: ``report.html``, ``graphs.txt`` and ``dump.json``, beside those of the report."""

from __future__ import annotations

import os
from pathlib import Path

from mstc.dump.coding import from_json, to_json
from mstc.dump.diff import Difference
from mstc.dump.model import Dump
from mstc.dump.page import to_html
from mstc.dump.text import to_text
from mstc.errors import DumpError

PAGE, GRAPHS, DATA = "report.html", "graphs.txt", "dump.json"


class Drawn:
    """A dump that a report writes beside itself."""

    def __init__(self, dump: Dump, difference: Difference | None = None) -> None:
        self.dump = dump
        self.difference = difference

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PAGE).write_text(to_html(self.dump, self.difference), encoding="utf-8")
        (folder / GRAPHS).write_text(to_text(self.dump), encoding="utf-8")
        (folder / DATA).write_text(to_json(self.dump) + "\n", encoding="utf-8")


def read(path: str | os.PathLike[str]) -> Dump:
    """The dump in a folder, or in its ``dump.json``. Raises `DumpError` where there is none."""
    place = Path(path)
    file = place / DATA if place.is_dir() else place
    if not file.is_file():
        raise DumpError(f"no dump at {place}: give a folder that `mstc dump --out` wrote, or its {DATA}")
    return from_json(file.read_text(encoding="utf-8"))
