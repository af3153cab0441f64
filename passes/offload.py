"""Values that the plan offloads are tagged; the lowering lets them wait for the backward outside of device memory.

Exact: bytes leave and come back. Which values: what loops and attention make and the backward keeps, as chosen under
a memory budget (`memory_budget`). How: `mstc.ops.saved` edits the compiled forward and backward graphs, the ops of
`mstc.ops.offload` copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.passes.base import Context, Pass
from mstc.report import Fidelity, Refusal


@dataclass(frozen=True)
class OffloadSite:
    """Results of a loop, attention or another op."""

    node: fx.Node
    results: tuple[int, ...]
    label: str


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[OffloadSite | Refusal]:
    if ctx.options.recompute.offload and ctx.options.memory_budget is None:
        reason = "without a memory budget everything is kept"
        yield Refusal("offload", "", "", reason, "give 'memory_budget': it decides what is offloaded")
    loops = ctx.facts.get("loops", {})
    for node in gm.graph.nodes:
        chosen = ctx.chosen.get(ctx.key_of(node.name)) or ctx.chosen.get(node.name)
        if node.op == "call_function" and chosen is not None and chosen.offload:
            yield OffloadSite(node, chosen.offload, loops[node].label if node in loops else node.name)


def apply(editor: Editor, site: OffloadSite, ctx: Context) -> None:
    editor.offload(site.node, site.results, f"{site.label}: waits for the backward elsewhere")


OFFLOAD = Pass("offload", "recompute", Fidelity.EXACT, find, apply)
