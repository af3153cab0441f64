"""Attention that is written out runs over chunks of queries.

    o[i] = sum_j w[i, j] v[j],    w[i, :] = f(s[i, :], i),    s[i, j] = q[i] . k[j]

for any f: softmax, as an op or written by hand, sigmoid, decay, gates. A row of scores belongs to one query, so running
the same nodes on a few queries at a time, with all keys and values, gives the same rows of o, the same gradients of q,
and with

    dL/dk = sum over chunks of the chunk's dL/dk,    dL/dv likewise (and a bias's table, sinks, slopes)

the same of what all queries share. Scores, weights, masks and biases exist for one chunk only, in the forward and in
the backward, which computes them again: memory grows with S, not with S * S. Whatever stands between the products
(softcap, additive bias, sinks, normalizers, masks with rows that are all hidden) is carried out as it is written.
Equal up to rounding: products of other shapes may sum in another order, and gradients are summed chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch.fx as fx

from mstc.graph.editor import Editor
from mstc.graph.provenance import source_of
from mstc.graph.written import Written, find_written
from mstc.graph.written_masks import MaskLabels
from mstc.passes.base import Context, Pass, refuse
from mstc.passes.loops import LoopSite, apply_loop
from mstc.passes.masks import known_values
from mstc.plan.chunks import choose_queries
from mstc.report import Fidelity, Refusal


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[LoopSite | Refusal]:
    everything, labels = list(find_written(gm.graph)), MaskLabels(known_values(gm, ctx))
    inside = {n for written in everything for n in written.region.nodes}
    for written in everything:
        scores = (written.scores or written.whole or written.ends)[0]
        chunks = choose_queries(written.region, ctx.options.query_chunks.chunk_tokens)
        if chunks.count == 1:
            yield refuse("query_chunks", scores, chunks.reason, "a longer sequence, or a smaller chunk_tokens")
            continue
        reason, remedy = obstacle(written, inside)
        if reason:
            yield refuse("query_chunks", scores, reason, remedy)
            continue
        yield from map(_made_whole, written.whole)
        kept = (False,) * len(written.region.outputs)
        label = f"attention by queries ({labels.of(written)})"
        yield LoopSite(written.region, chunks, kept, False, False, label, mixer=True)


def _made_whole(node: fx.Node) -> Refusal:
    """What the loop reads of all queries and keys."""
    reason = "it is made for all queries and keys: nothing proves that its rows may be made a few at a time"
    return refuse("query_chunks", node, reason, "make it of operations that treat each query by itself")


def obstacle(written: Written, inside: set[fx.Node]) -> tuple[str, str]:
    """Why the scores must be made whole, and what would help; "" where nothing stands in the way.

    inside: nodes of all attention that is written out; what those share, each has a copy of.
    """
    if not written.scores:
        unproven = _made_whole((written.whole or written.ends)[0])
        return unproven.reason, unproven.remedy
    if written.draws:
        return (
            f"{written.draws[0].name} draws random numbers for the attention weights",
            "set the attention's dropout to 0",
        )
    readers = [n for n in written.readers if n not in inside]
    if readers:
        shown = ", ".join(f"{n.name} ({source_of(n)})" if source_of(n) else n.name for n in readers[:3])
        return (
            f"the attention scores or weights are also read by {shown}",
            "read each row for its own query only, and do not return it",
        )
    return "", ""


def apply(editor: Editor, site: LoopSite, ctx: Context) -> None:
    apply_loop(editor, site, ctx)


QUERY_CHUNKS = Pass("query_chunks", "query_chunks", Fidelity.ROUNDING, find, apply)
