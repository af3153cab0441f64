"""What was found, done and refused in one compiled graph, as plain frozen records."""

from __future__ import annotations

import enum
import json
import os
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

__all__ = ["Edit", "Fidelity", "Refusal", "RegionInfo", "Report", "clear_reports", "record", "reports"]


class Fidelity(enum.IntEnum):
    """How close a pass keeps the numbers; a graph's fidelity is the largest of its passes'."""

    EXACT = 0
    ROUNDING = 1
    APPROXIMATE = 2

    @property
    def words(self) -> str:
        return ("exact", "equal up to rounding", "approximate")[self.value]


@dataclass(frozen=True)
class Refusal:
    """A candidate that was left as it was.

    node: name of the node in the normal form; source: the user's own ``file:line``
    (or "" where the graph does not tell); reason: why; remedy: what would make it work.
    """

    pass_name: str
    node: str
    source: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Edit:
    """One recorded change of the graph: ``added`` and ``removed`` are node names."""

    pass_name: str
    what: str
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class RegionInfo:
    """One tokenwise stretch (``kind == "region"``) or one mixer (``kind == "mixer"``).

    label: what it is in people's words ("gated MLP", "attention (causal)", ...);
    layer: the layer's number where the module path tells one, else None;
    chunks: how many mini-sequences it runs in (1: left whole); tokens: its length;
    ops: how many operators; loop: the name of its loop in profiles, "" if it has none;
    nodes: their names in the rewritten graph.
    """

    kind: str
    label: str
    layer: int | None
    module: str
    source: str
    tokens: str = ""
    chunks: int = 1
    ops: int = 0
    loop: str = ""
    saved: tuple[str, ...] = ()
    note: str = ""
    nodes: tuple[str, ...] = ()


class Drawing(Protocol):
    """The graphs behind a report, which it writes down beside itself (see `mstc.dump`)."""

    def save(self, folder: Path) -> None: ...


@dataclass
class Report:
    """Everything that mstc knows of one compiled graph. See `mstc.reports`.

    graph: its name; options: in force, as a caller would write them; versions: of mstc, torch and Python;
    regions, refusals, edits: in the order of the graph and of the passes; plan: lines of the choice under a memory
    budget, else none; timings: seconds by pass; fidelity: how close the passes that changed something keep the numbers;
    around: what runs the graph around its loops, where that is not what compiles them.
    """

    graph: str = ""
    options: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    regions: list[RegionInfo] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    plan: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    fidelity: Fidelity = Fidelity.EXACT
    around: str = ""
    drawing: Drawing | None = field(default=None, repr=False, compare=False)

    # ------------------------------------------------------------------ writing it down

    def to_text(self) -> str:
        """The report as plain text: the same report always gives the same text."""
        title = self.graph if self.graph.startswith("graph") else f"graph {self.graph}".rstrip()
        sections = [
            _section(title, [f"fidelity: {self.fidelity.words}", *self._around()]),
            _section("options", _pairs(self.options)),
            _section("regions", _table(_REGION_HEAD, [_region_row(r) for r in self.regions])),
            _section("refusals", [_refusal_line(r) for r in self.refusals]),
            _section("edits", [_edit_line(e) for e in self.edits]),
            _section("plan", self.plan),
            _section("timings in seconds", [f"{name}: {value:.3f}" for name, value in self.timings.items()]),
            _section("versions", _pairs(self.versions)),
        ]
        return "\n".join(s for s in sections if s)

    def _around(self) -> list[str]:
        return [f"around the loops: {self.around}, since a compiler has nothing to gain there"] if self.around else []

    def to_json(self) -> str:
        """The report as JSON; `Report.from_json` reads it back. Raises TypeError on options that JSON cannot hold."""
        data = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "drawing"}
        return json.dumps({**data, "fidelity": self.fidelity.name.lower()}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote."""
        data = json.loads(text)
        data["regions"] = [RegionInfo(**with_tuples(r)) for r in data["regions"]]
        data["refusals"] = [Refusal(**r) for r in data["refusals"]]
        data["edits"] = [Edit(**with_tuples(e)) for e in data["edits"]]
        data["fidelity"] = Fidelity[data["fidelity"].upper()]
        return cls(**data)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the report into ``folder`` (made if missing) and return its path.

        ``report.txt`` and ``report.json`` are `to_text` and `to_json`; a report that mstc made also gives
        ``report.html``, ``graphs.txt`` and ``dump.json`` (see `mstc.dump.files`).
        """
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / "report.txt").write_text(self.to_text(), encoding="utf-8")
        (path / "report.json").write_text(self.to_json() + "\n", encoding="utf-8")
        if self.drawing is not None:
            self.drawing.save(path)
        return path


# ------------------------------------------------------------------ the reports of this process

_KEEP = 256  # the newest; a process that compiles more graphs loses the oldest
_lock = threading.Lock()
_reports: deque[Report] = deque(maxlen=_KEEP)


def record(report: Report) -> Report:
    """Add a compiled graph's report to `reports` and return it."""
    with _lock:
        _reports.append(report)
    return report


def reports() -> list[Report]:
    """The reports of the graphs compiled in this process, newest last (at most the newest 256)."""
    with _lock:
        return list(_reports)


def clear_reports() -> None:
    """Forget all reports."""
    with _lock:
        _reports.clear()


# ------------------------------------------------------------------ text

_REGION_HEAD = ("layer", "kind", "what", "chunks", "tokens", "ops", "loop", "source", "note")


def _section(title: str, lines: Iterable[str]) -> str:
    body = [f"  {line}" for line in lines]
    return "\n".join([title, *body, ""]) if body else ""


def _pairs(values: Mapping[str, object]) -> list[str]:
    return [f"{name}: {value}" for name, value in values.items()]


def _region_row(region: RegionInfo) -> tuple[str, ...]:
    layer = "-" if region.layer is None else str(region.layer)
    saved = f"saves {', '.join(region.saved)}" if region.saved else ""
    note = "; ".join(part for part in (region.note, saved) if part)
    counts = (str(region.chunks), region.tokens, str(region.ops))
    return (layer, region.kind, region.label, *counts, region.loop, region.source or region.module, note)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return []
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]


def _refusal_line(refusal: Refusal) -> str:
    where = " at ".join(part for part in (refusal.node, refusal.source) if part)
    remedy = f" ({refusal.remedy})" if refusal.remedy else ""
    return ": ".join(part for part in (refusal.pass_name, where, refusal.reason) if part) + remedy


def _edit_line(edit: Edit) -> str:
    return f"{edit.pass_name}: {edit.what} (+{len(edit.added)} -{len(edit.removed)} nodes)"


def _plain(value: Any) -> Any:
    return (
        [asdict(v) if isinstance(v, Edit | Refusal | RegionInfo) else v for v in value]
        if isinstance(value, list)
        else value
    )


def with_tuples(data: Mapping[str, Any]) -> dict[str, Any]:
    """A record's values as read from JSON, which knows lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}
