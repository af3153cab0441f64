"""What tells two dumps apart: options, versions, what happened to the blocks, refusals, memory, graphs."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from mstc.dump.model import Dump, GraphDump
from mstc.dump.text import graph_text
from mstc.plan.words import bytes_text
from mstc.report import Refusal

Pair = tuple[str, str]


@dataclass(frozen=True)
class GraphDifference:
    """Of one graph: figures (a, b) by name, statuses of blocks, refusals in one only, and the rewritten graphs."""

    name: str
    figures: dict[str, Pair]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Difference:
    """Of two dumps, A and B."""

    a: str
    b: str
    settings: dict[str, Pair]
    graphs: tuple[GraphDifference, ...]

    def to_data(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def same(self) -> bool:
        figures = [p for g in self.graphs for p in g.figures.values()]
        texts = [t for g in self.graphs for t in (g.text, *g.only_a, *g.only_b)]
        return not self.settings and not any(texts) and all(a == b for a, b in figures)


def difference(a: Dump, b: Dump, names: Pair) -> Difference:
    settings = {**_differing(a.options, b.options, "options."), **_differing(a.versions, b.versions, "versions.")}
    graphs = [_graph(x, y) for x, y in zip_longest(a.graphs, b.graphs)]
    return Difference(*names, settings, tuple(graphs))


def _differing(a: Mapping[str, object], b: Mapping[str, object], prefix: str) -> dict[str, Pair]:
    names = dict.fromkeys([*a, *b])
    return {prefix + n: (str(a.get(n, "")), str(b.get(n, ""))) for n in names if a.get(n) != b.get(n)}


def _graph(a: GraphDump | None, b: GraphDump | None) -> GraphDifference:
    name = (a or b).name  # type: ignore[union-attr]
    figures_a, figures_b = _figures(a), _figures(b)
    figures = {n: (figures_a.get(n, "0"), figures_b.get(n, "0")) for n in dict.fromkeys([*figures_a, *figures_b])}
    refused_a, refused_b = (Counter(_reasons(g.refusals if g else ())) for g in (a, b))
    return GraphDifference(
        name, figures, tuple((refused_a - refused_b).elements()), tuple((refused_b - refused_a).elements()), _text(a, b)
    )


def _figures(graph: GraphDump | None) -> dict[str, str]:
    if graph is None:
        return {}
    statuses = Counter(f"blocks {b.status}" for b in graph.blocks)
    return {
        "fidelity": graph.fidelity.words,
        "nodes captured": str(len(graph.first)),
        "nodes rewritten": str(len(graph.last)),
        "predicted peak, as written": bytes_text(graph.before.peak),
        "predicted peak, rewritten": bytes_text(graph.after.peak),
        **{name: str(n) for name, n in sorted(statuses.items())},
        "refusals": str(len(graph.refusals)),
    }


def _reasons(refusals: Iterable[Refusal]) -> list[str]:
    return [f"{r.pass_name}: {r.node}: {r.reason}" for r in refusals]


def _text(a: GraphDump | None, b: GraphDump | None) -> str:
    old, new = (graph_text(g.last if g else ()).splitlines() for g in (a, b))
    return "\n".join(difflib.unified_diff(old, new, "A", "B", n=2, lineterm=""))
