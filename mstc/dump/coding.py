"""A dump as JSON and back. Nodes that stay the same through several passes are written once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, fields
from typing import Any

from mstc.dump.model import FORMAT, Block, Dump, Fold, GraphDump, Measured, Memory, Node, Stage
from mstc.errors import DumpError
from mstc.report import Edit, Fidelity, Refusal, with_tuples

_SHARED = ("source", "code", "module", "value", "op", "kind")  # columns whose texts repeat: written as positions
_COLUMNS = tuple(f.name for f in fields(Node))


def to_data(dump: Dump) -> dict[str, Any]:
    """The dump as JSON types."""
    return {
        "format": FORMAT,
        "title": dump.title,
        "command": dump.command,
        "options": dump.options,
        "versions": dump.versions,
        "seconds": round(dump.seconds, 3),
        "measured": [asdict(m) for m in dump.measured],
        "graphs": [_graph(g) for g in dump.graphs],
    }


def to_json(dump: Dump) -> str:
    return json.dumps(to_data(dump), separators=(",", ":"), default=str)


def from_json(text: str) -> Dump:
    """The dump that `to_json` wrote. Raises `DumpError` on anything else."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as e:
        raise DumpError(f"not a dump: {e}") from e
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DumpError(f"not a dump of format {FORMAT}: write it anew with this version of mstc")
    graphs = tuple(_read_graph(g) for g in data["graphs"])
    measured = tuple(read_measured(m) for m in data["measured"])
    return Dump(data["title"], data["command"], data["options"], data["versions"], graphs, data["seconds"], measured)


# ------------------------------------------------------------------ writing


class _Table:
    """Distinct values in the order in which they came, and their positions."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._at: dict[Any, int] = {}

    def add(self, value: Any) -> int:
        if value not in self._at:
            self._at[value] = len(self.values)
            self.values.append(value)
        return self._at[value]


def _graph(graph: GraphDump) -> dict[str, Any]:
    texts, nodes = _Table(), _Table()
    orders = [[nodes.add(n) for n in s.nodes] for s in graph.stages]
    return {
        "name": graph.name,
        "training": graph.training,
        "fidelity": _fidelity(graph.fidelity),
        "broken": graph.broken,
        "stages": [_stage(s, orders[i], orders[i - 1] if i else None) for i, s in enumerate(graph.stages)],
        "nodes": [_row(n, texts) for n in nodes.values],
        "columns": _COLUMNS,
        "shared": _SHARED,
        "texts": texts.values,
        "blocks": [asdict(b) for b in graph.blocks],
        "folds": [asdict(f) for f in graph.folds],
        "refusals": [asdict(r) for r in graph.refusals],
        "plan": graph.plan,
        "timings": {k: round(v, 4) for k, v in graph.timings.items()},
        "before": asdict(graph.before),
        "after": asdict(graph.after),
    }


def _row(node: Node, texts: _Table) -> list[Any]:
    return [texts.add(v) if name in _SHARED else v for name, v in zip(_COLUMNS, astuple(node), strict=True)]


def _stage(stage: Stage, order: Sequence[int], before: Sequence[int] | None) -> dict[str, Any]:
    return {
        "name": stage.name,
        "fidelity": _fidelity(stage.fidelity),
        "seconds": round(stage.seconds, 4),
        "edits": [asdict(e) for e in stage.edits],
        "refusals": [asdict(r) for r in stage.refusals],
        "order": None if order == before else order,
    }


def _fidelity(fidelity: Fidelity) -> str:
    return fidelity.name.lower()


# ------------------------------------------------------------------ reading


def read_measured(data: Mapping[str, Any]) -> Measured:
    """The measured step that `dataclasses.asdict` wrote."""
    return Measured(**{**data, "samples": tuple((seconds, used) for seconds, used in data["samples"])})


def _read_graph(data: Mapping[str, Any]) -> GraphDump:
    texts = data["texts"]
    nodes = [_read_node(row, texts) for row in data["nodes"]]
    stages: list[Stage] = []
    for s in data["stages"]:
        known = stages[-1].nodes if s["order"] is None else tuple(nodes[i] for i in s["order"])
        edits = tuple(Edit(**with_tuples(e)) for e in s["edits"])
        refusals = tuple(Refusal(**r) for r in s["refusals"])
        stages.append(Stage(s["name"], known, Fidelity[s["fidelity"].upper()], s["seconds"], edits, refusals))
    return GraphDump(
        name=data["name"],
        training=data["training"],
        fidelity=Fidelity[data["fidelity"].upper()],
        stages=tuple(stages),
        blocks=tuple(Block(**with_tuples(b)) for b in data["blocks"]),
        folds=tuple(Fold(**f) for f in data["folds"]),
        refusals=tuple(Refusal(**r) for r in data["refusals"]),
        plan=tuple(data["plan"]),
        timings=data["timings"],
        before=Memory(**with_tuples(data["before"])),
        after=Memory(**with_tuples(data["after"])),
        broken=data["broken"],
    )


def _read_node(row: Sequence[Any], texts: Sequence[str]) -> Node:
    values = {name: texts[v] if name in _SHARED else v for name, v in zip(_COLUMNS, row, strict=True)}
    return Node(**with_tuples(values))
