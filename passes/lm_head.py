"""The last region, with head and loss, chunk by chunk, its gradients computed in the forward.

    L = sum_t l(h_t, W),   dL/dW = sum_t dl/dW,   dL/dh_t local to t

so that no more than one chunk of logits ever exists. Equal up to rounding: sums run chunk by chunk.
A region that ends in one differentiable scalar computes its gradients along with it; any other
(several losses, logits that are asked for) runs as a loop that recomputes in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.labels import region_label
from mstc.passes.base import Context, Pass, refuse
from mstc.passes.loops import LoopSite, apply_loop, chunks_of, ends_in_loss
from mstc.plan.chunks import choose
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
        yield LoopSite(head, chunks, kept, False, ends_in_loss(head, ctx.training), region_label(head))


def apply(editor: Editor, site: LoopSite, ctx: Context) -> None:
    apply_loop(editor, site, ctx)


LM_HEAD = Pass("lm_head", "lm_head", Fidelity.ROUNDING, find, apply)
