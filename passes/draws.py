"""Masks of dropouts inside loops, those over tokens and those over queries, are drawn outside them.

    y = x * m / (1 - p),   m ~ Bernoulli(1 - p)

A loop runs its body twice, in the forward and again in the backward, and both must see the same m. So

- where the lowering draws as eager does ("eager", "aot_eager", Inductor with ``fallback_random``), m is drawn whole,
  one byte per element, in eager's order, and is an input of the loop: the same numbers as in eager;
- through Inductor, which draws numbers of its own, one seed per token is drawn, and the body makes
  m from it (`mstc.ops.keep`): nothing of the size of m is kept.

Other ops that draw without looking at a value (``rand_like(x)``) draw into an empty tensor of that shape, so that no
region has to wait for x. Exact: the same function of what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.axes import Axes
from mstc.graph.draws import BLIND, draws_mask, drops
from mstc.graph.editor import Editor
from mstc.graph.places import Place
from mstc.graph.regions import Region, find_regions
from mstc.graph.rules.call import Call
from mstc.graph.sizes import shape_of
from mstc.graph.written import find_written
from mstc.ops.keep import SEEDS
from mstc.ops.pieces import order_of
from mstc.passes.base import Context, Pass
from mstc.plan.chunks import choose, choose_queries
from mstc.report import Fidelity

aten = torch.ops.aten


@dataclass(frozen=True)
class DrawSite:
    """A random op, and where its tokens stand if a region that will run as a loop holds it."""

    node: fx.Node
    place: Place | None = None


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[DrawSite]:
    random = [n for n in gm.graph.nodes if draws_mask(n) or n.target in BLIND]
    if not random:
        return
    within = _in_loops(gm.graph, ctx)
    for node in random:
        if node in within:
            yield DrawSite(node, within[node])
        elif node.target in BLIND and not _is_free(node) and _any_loop(ctx):
            yield DrawSite(node)


def _any_loop(ctx: Context) -> bool:
    options = ctx.options
    return options.mini_sequence.enabled or options.lm_head.enabled or options.query_chunks.enabled


def _in_loops(graph: fx.Graph, ctx: Context) -> dict[fx.Node, Place]:
    """The draws of masks in what may run as a loop, and where tokens, or queries, stand in them."""
    options, within = ctx.options, dict[fx.Node, Place]()
    if options.mini_sequence.enabled or options.lm_head.enabled:
        for region in find_regions(graph, Axes(graph), drawing=True):
            inside = [n for n in region.nodes if draws_mask(n)]
            if inside and _may_loop(region, ctx):
                within |= {n: region.proofs[n].place for n in inside}
    if options.query_chunks.enabled:
        for written in find_written(graph):
            whole = choose_queries(written.region, options.query_chunks.chunk_tokens).count == 1
            if not whole and all(map(draws_mask, written.draws)):
                within |= {n: written.region.proofs[n].place for n in written.draws}
    return within


def _may_loop(region: Region, ctx: Context) -> bool:
    """Under a memory budget any region may: the plan chooses later."""
    options = ctx.options
    if options.memory_budget is not None:
        return True
    asked = [options.mini_sequence.chunk_tokens] if options.mini_sequence.enabled else []
    asked += [options.lm_head.chunk_tokens] if options.lm_head.enabled and region.sums else []
    return any(choose(region, tokens).count > 1 for tokens in asked)


def _is_free(node: fx.Node) -> bool:
    """Whether what it draws into depends on no input already."""
    source = node.args[0]
    return isinstance(source, fx.Node) and not source.all_input_nodes


def apply(editor: Editor, site: DrawSite, ctx: Context) -> None:
    node = site.node
    if site.place is None:
        editor.replace(node, _freed(editor, node), f"{node.target} draws into an empty tensor")
        return
    seeded = _draws_of_its_own(ctx)
    keep = 1.0 - Call(node).arg("p") if drops(node) else Call(node).arg("p")
    if seeded:
        mask = _seeded(editor, node, site.place, keep)
    else:
        mask = _drawn(editor, node, keep)
    if drops(node):
        new = _dropped(editor, node, mask, keep)
    else:
        new = editor.call(aten._to_copy.default, (mask,), {"dtype": node.meta["val"].dtype}, like=node)
    editor.replace(node, new, "mask from one seed per token" if seeded else "mask drawn outside the loop")


def _draws_of_its_own(ctx: Context) -> bool:
    """Whether the lowering draws other numbers than eager, so that nothing has to be replayed.

    ``verify`` holds a pass's graph against the one before it, with the same random numbers.
    """
    return ctx.options.lower == "inductor" and not ctx.options.verify and not compat.draws_as_eager()


def _empty(editor: Editor, node: fx.Node, order: Sequence[int], dtype: torch.dtype) -> fx.Node:
    """What ``node`` draws into, its dimensions in the order of memory, in which eager draws."""
    value = node.meta["val"]
    sizes = shape_of(value)
    shape = [editor.number(sizes[d], like=node) for d in order]
    return editor.call(aten.empty.memory_format, (shape,), {"dtype": dtype, "device": value.device}, like=node)


def _in_place(editor: Editor, node: fx.Node, drawn: fx.Node, order: Sequence[int]) -> fx.Node:
    """The dimensions back in their own order."""
    if list(order) == sorted(order):
        return drawn
    back = [list(order).index(d) for d in range(len(order))]
    return editor.call(aten.permute.default, (drawn, back), like=node)


def _order(node: fx.Node) -> tuple[int, ...]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return order_of(source.meta["val"])


def _freed(editor: Editor, node: fx.Node) -> fx.Node:
    """The same draw into a tensor that depends on nothing."""
    order = _order(node)
    empty = _empty(editor, node, order, node.meta["val"].dtype)
    drawn = editor.call(node.target, (empty, *node.args[1:]), node.kwargs, like=node)  # type: ignore[arg-type]
    return _in_place(editor, node, drawn, order)


def _drawn(editor: Editor, node: fx.Node, keep: float) -> fx.Node:
    """The whole mask as bool."""
    order = _order(node)
    if node.meta["val"].device.type == "cpu" or not drops(node):
        mask = editor.call(aten.bernoulli.p, (_empty(editor, node, order, torch.bool), keep), like=node)
    else:
        # Elsewhere eager draws in one fused op, in an order of its own.
        empty = _empty(editor, node, order, node.meta["val"].dtype)
        both = editor.call(aten.native_dropout.default, (empty, Call(node).arg("p"), True), like=node)
        mask = editor.getitem(both, 1, like=node)
    return _in_place(editor, node, mask, order)


def _seeded(editor: Editor, node: fx.Node, place: Place, keep: float) -> fx.Node:
    value = node.meta["val"]
    settings = {"dtype": torch.int64, "device": value.device}
    seeds = editor.call(aten.randint.low, (0, SEEDS, [editor.number(place.n, like=node)]), settings, like=node)
    outer, inner, *sizes = (editor.number(s, like=node) for s in (place.outer, place.inner, *shape_of(value)))
    args = (seeds, sizes, place.dim, outer, inner, keep)
    return editor.call(torch.ops.mstc.keep.default, args, like=node)


def _dropped(editor: Editor, node: fx.Node, mask: fx.Node, keep: float) -> fx.Node:
    """x * (m / (1 - p)), as eager rounds it."""
    x = node.args[0]
    noise = editor.call(aten._to_copy.default, (mask,), {"dtype": node.meta["val"].dtype}, like=node)
    if node.meta["val"].device.type == "cpu":
        return editor.call(aten.mul.Tensor, (x, editor.call(aten.div.Tensor, (noise, keep), like=node)), like=node)
    return editor.call(aten.mul.Tensor, (editor.call(aten.mul.Tensor, (x, noise), like=node), 1.0 / keep), like=node)


DRAWS = Pass("draws", "", Fidelity.EXACT, find, apply)

__all__ = ["DRAWS", "DrawSite"]
