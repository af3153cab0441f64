"""The user's `torch.utils.checkpoint` is taken into the plan, so that nothing runs a third time. Exact.

A loop computes its insides anew in its backward. Were it to run again as part of a checkpointed block too, its products
would be computed three times: in the forward, for the block, and in its backward. So loops take no tags from the
blocks that they come from (`mstc.passes.loops`), and this pass takes them off the attention of these blocks, which
then is kept or runs again as the plan has it. What else stands in a block, and blocks without loops, stay as the
user wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.fx as fx

from mstc.graph.attention import attention_in
from mstc.graph.editor import Editor
from mstc.passes.base import Context, Pass
from mstc.report import Fidelity


@dataclass(frozen=True)
class CheckpointSite:
    """An attention in a checkpointed block whose loops the plan has."""

    node: fx.Node


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[CheckpointSite]:
    if ctx.options.keeps_checkpoints:
        return
    taken = set().union(*ctx.facts.get("checkpoints", {}).values())
    for node in attention_in(gm.graph):
        if node.meta.get("recompute") and (node.meta["ac_graph_id"] in taken or ctx.chosen or ctx.planning):
            yield CheckpointSite(node)


def apply(editor: Editor, site: CheckpointSite, ctx: Context) -> None:
    editor.keep(site.node, "attention of a checkpointed block: kept or run again as planned")


CHECKPOINTS = Pass("checkpoints", "", Fidelity.EXACT, find, apply)
