"""Loops whose outputs only mixers read (q, k, v) run again in the backward instead of being kept.

Exact: the same loop runs on the same inputs. Attention itself, which costs most to run again, and
what its backward needs of it (output, log-sum-exp) are kept, unless a memory budget says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.ops.loop import is_loop
from mstc.passes.base import Chosen, Context, Pass
from mstc.report import Fidelity


@dataclass(frozen=True)
class RecomputeSite:
    """A loop or mixer to tag; block: what runs again together, so that the partitioner keeps what enters it."""

    node: fx.Node
    label: str
    block: int


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[RecomputeSite]:
    loops = ctx.facts.get("recompute", {})
    block = 0
    for node in gm.graph.nodes:
        # A block ends with the first loop that is kept: what follows starts from its results.
        if is_loop(node) and node not in loops:
            block += 1
        block = max(block, node.meta.get("ac_graph_id", 0) + 1)
        if node.meta.get("recompute"):
            continue  # a block of the user's runs again as a whole
        if node in loops:
            yield RecomputeSite(node, loops[node], block)
        elif ctx.chosen.get(node.name, Chosen()).again:
            yield RecomputeSite(node, "attention", block)


def apply(editor: Editor, site: RecomputeSite, ctx: Context) -> None:
    editor.recompute(site.node, site.block, f"{site.label}: runs again in the backward")


RECOMPUTE = Pass("recompute", "recompute", Fidelity.EXACT, find, apply)
