"""The last region, with head and loss, chunk by chunk, its gradients computed in the forward.

    L = sum_t l(h_t, W),   dL/dW = sum_t dl/dW,   dL/dh_t local to t

so that no more than one chunk of logits ever exists. Equal up to rounding: sums run chunk by chunk.
A region that ends in one differentiable scalar computes its gradients along with it; any other
(several losses, logits that are asked for) runs as a loop that recomputes in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.labels import region_label
from mstc.ops.build import costs_of
from mstc.passes.base import Context, Pass, refuse
from mstc.passes.loops import LoopSite, apply_loop, chunks_of, ends_in_loss, recipe_of
from mstc.plan.chunks import choose, cut_further, may_hold_several
from mstc.plan.split import split_head
from mstc.report import Fidelity, Refusal


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[LoopSite | Refusal]:
    known = ctx.analysis(gm)
    for region in known.regions:
        if not region.sums:
            continue
        _, head = split_head(known.axes, region)
        asked = ctx.options.lm_head.chunk_tokens
        planned = chunks_of(head, asked, ctx)
        chunks = planned or choose(head, asked)
        if planned is None and chunks.count == 1:
            yield refuse("lm_head", head.heavy[-1], chunks.reason, "a longer sequence, or a smaller chunk_tokens")
            continue
        kept = tuple(True for _ in head.outputs)
        site = LoopSite(head, chunks, kept, False, ends_in_loss(head, ctx.training), region_label(head))
        automatic = planned is None and not isinstance(asked, int)
        yield _cut_further(site, ctx) if automatic and site.loss and may_hold_several(head) else site


def _cut_further(site: LoopSite, ctx: Context) -> LoopSite:
    """The site in shorter chunks where each would hold several values of all classes at once (distillation)."""
    costs = costs_of(site.region, recipe_of(site, ctx))
    return replace(site, chunks=cut_further(site.chunks, site.region, costs.live[1] / max(costs.largest[1], 1)))


def apply(editor: Editor, site: LoopSite, ctx: Context) -> None:
    apply_loop(editor, site, ctx)


LM_HEAD = Pass("lm_head", "lm_head", Fidelity.ROUNDING, find, apply)
