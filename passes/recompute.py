"""Loops whose outputs only mixers read (q, k, v) run again in the backward instead of being kept.

Exact: the same loop runs on the same inputs. Attention itself, which costs most to run again, and
what its backward needs of it (output, log-sum-exp) are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.passes.base import Context, Pass
from mstc.report import Fidelity


@dataclass(frozen=True)
class RecomputeSite:
    """A loop to tag; block: its number, so that the partitioner keeps what enters it."""

    loop: fx.Node
    label: str
    block: int


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[RecomputeSite]:
    for block, (loop, label) in enumerate(ctx.facts.get("recompute", {}).items()):
        yield RecomputeSite(loop, label, block)


def apply(editor: Editor, site: RecomputeSite, ctx: Context) -> None:
    editor.recompute(site.loop, site.block, f"{site.label}: runs again in the backward")


RECOMPUTE = Pass("recompute", "recompute", Fidelity.EXACT, find, apply)
