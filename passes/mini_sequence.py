"""Tokenwise regions run a few tokens at a time.

For a region y = f(x, W) with y_t = f(x_t, W), running f on chunks of tokens gives the same y, and with

    dL/dx_t = J_x f(x_t, W)^T dL/dy_t,     dL/dW = sum over chunks of J_W f(x_chunk, W)^T dL/dy_chunk

the same gradients, while intermediates exist for one chunk only. Equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx as fx

from mstc.graph.axes import Axes
from mstc.graph.editor import Editor
from mstc.graph.labels import region_label
from mstc.graph.regions import Region, left_outside
from mstc.passes.base import Chosen, Context, Pass, refuse
from mstc.passes.loops import LoopSite, apply_loop, chunks_of, loop_key, read_by_loop
from mstc.plan.chunks import choose
from mstc.plan.split import Part, split_recompute
from mstc.report import Fidelity, Refusal


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[LoopSite | Refusal]:
    known = ctx.analysis(gm)
    axes, regions = known.axes, known.regions
    asked = ctx.options.mini_sequence.chunk_tokens
    for region in regions:
        chunks = choose(region, asked)
        parts = _parts(axes, region, regions, ctx) if chunks.count > 1 or ctx.planning or ctx.chosen else []
        planned = [chunks_of(part.region, asked, ctx) for part in parts]
        if chunks.count == 1 and (None in planned or not planned):
            yield refuse(
                "mini_sequence", region.heavy[-1], chunks.reason, "a longer sequence, or a smaller chunk_tokens"
            )
            continue
        for part, count in zip(parts, planned, strict=True):
            chosen = ctx.chosen.get(loop_key(part.region), Chosen(again=True))
            kept = tuple(not part.recompute and _kept(n, regions, region, ctx) for n, _ in part.region.outputs)
            again, label = part.recompute and chosen.again, region_label(part.region)
            values = tuple(n for n in part.region.nodes if n.name in chosen.saves)
            yield LoopSite(part.region, count or chunks, kept, again, False, label, saves=values)
    for node, reason in left_outside(gm.graph, axes, regions):
        yield refuse("mini_sequence", node, reason)


def _parts(axes: Axes, region: Region, regions: list[Region], ctx: Context) -> list[Part]:
    if not (ctx.training and ctx.options.recompute.enabled):
        return [Part(region)]
    return split_recompute(axes, region, lambda n: _kept(n, regions, region, ctx))


def _kept(node: fx.Node, regions: list[Region], own: Region, ctx: Context) -> bool:
    return read_by_loop(node, regions, own, ctx.facts.get("mixers", {}))


def apply(editor: Editor, site: LoopSite, ctx: Context) -> None:
    apply_loop(editor, site, ctx)


MINI_SEQUENCE = Pass("mini_sequence", "mini_sequence", Fidelity.ROUNDING, find, apply)
