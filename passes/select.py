"""A selection of the logits' tokens moves before the head: select(f(x)) = f(select(x)) for tokenwise f.

``logits[:, :-1]`` against ``labels[:, 1:]`` is how many losses are shifted, ``logits[mask]`` and ``logits[:, -k:]`` how
others leave tokens out; they would part the head from its loss and keep all logits. ``losses[mask]`` would part a loss
from its sum, so that the backward had to make the logits again. Exact up to the shape of the matrix products, so equal
up to rounding.

A few rows of logits that are read whole too, or by selections that together are more than all, are computed twice: a
product on one row of each sequence costs nothing beside logits of all of them that would have to stay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.axes import Axes, Axis, Tokenwise
from mstc.graph.costs import hint, is_heavy, is_seen, nbytes
from mstc.graph.editor import Editor
from mstc.graph.places import Place
from mstc.graph.reach import ancestors
from mstc.graph.regions import Region
from mstc.graph.rules.call import operands_of
from mstc.graph.selections import Rows, Selection, about_logits, reshape, row_axes, select, selections_of
from mstc.graph.sizes import product, shape_of, size
from mstc.ops.body import takes_shape, with_shape
from mstc.passes.base import Context, Pass, refuse
from mstc.plan.split import head_of, read_by
from mstc.report import Fidelity, Refusal

aten = torch.ops.aten

# Values that are so much smaller than what they are made of are losses: the head goes with them.
NARROW = 4

# How much more than all rows a product may run on, so that logits need not be made whole.
REPEATED = 1 / 8

# Tracing these asks whether there is anything to reduce, which a length that data decide does not tell.
_ASK_FOR_ROWS = (aten.logsumexp.default,)

Head = tuple[list[Selection], set[fx.Node]]  # equal selections, and what leads to nothing else
Places = tuple[Place, ...]  # of each axis that the rows are made of, in a value; none where it holds no rows


@dataclass(frozen=True)
class SelectSite:
    """A head that is to run on selected rows only.

    cuts: the equal selections of its values; nodes: the head, with where the rows stand in each result; reads: where
    they stand in each operand, nowhere if it is the same for all.
    """

    cuts: tuple[Selection, ...]
    nodes: Mapping[fx.Node, Places]
    reads: Mapping[fx.Node, tuple[Places, ...]]


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[SelectSite | Refusal]:
    known = ctx.analysis(gm)
    told: list[Refusal] = []
    for region in known.regions:
        heads = [(g, head_of(region, _values(g))) for g in _groups(known.axes, region)]
        kept, refusals = _own_heads(region, [h for h in heads if gains(region, *h)])
        if _repeats_work(kept) or _repeats_gradients(kept):
            reason = "what is selected, together, costs more than all of it"
            kept, refusals = [], [*refusals, refuse("select", kept[0][0][0].node, reason)]
        # What is left may be less once a few rows are computed apart: the pass runs again.
        few = _few_rows(region, heads) if refusals else []
        told += [] if few else refusals
        for group, head in few or kept:
            yield _site(known.axes, group, head)
    yield from about_logits(gm.graph, told)


def _groups(axes: Axes, region: Region) -> list[list[Selection]]:
    """Selections of the region's outputs that take its axis apart; those that take the same rows stand together."""
    found: dict[Any, list[Selection]] = {}
    for value, _ in region.outputs:
        readers = [u for u in value.users if u not in region.proofs]
        for cut in (c for u in readers for c in selections_of(u, value)):
            rows = row_axes(axes, cut)
            if rows and axes.find(region.axis) in rows:
                found.setdefault((cut.alike(), rows), []).append(cut)
    return list(found.values())


def _own_heads(region: Region, heads: list[Head]) -> tuple[list[Head], list[Refusal]]:
    """The part of each head that leads to selections only; what others read too becomes an input of it."""
    refusals: list[Refusal] = []
    while heads:
        cuts = _readers([c for g, _ in heads for c in g])
        own = {n for _, h in heads for n in h}
        while others := {n for n in own if any(u not in own and u not in cuts for u in n.users)}:
            own -= others
        left = [(g, ancestors(_values(g), own)) for g, _ in heads if own.issuperset(_values(g))]
        left = [h for h in left if gains(region, *h)]
        lost = [h for h in heads if not any(h[0] is g for g, _ in left)]
        refusals += [_read_whole(group[0]) for group, head in lost if _is_wide(region, group, head)]
        if not lost:
            break
        heads = left
    return heads, refusals


def _few_rows(region: Region, heads: list[Head]) -> list[Head]:
    """Heads to run once more on a few rows, where their values need not be whole for anything else."""
    cuts = {c.reader for g, _ in heads for c in g}
    inside = {*region.proofs, *region.sums, *cuts}
    found: list[Head] = []
    for group, head in sorted(heads, key=lambda h: _share(h[0], unknown=1.0)):
        values = _values(group)
        wide = [n for n in head if NARROW * nbytes(n) > max(map(nbytes, values))]
        made_whole = any(u not in inside for n in wide for u in n.users)
        more = [*found, (group, head)]
        together = sum(_share(g, unknown=1.0) for g, _ in more)
        gains_memory = gains(region, group, head) and _is_wide(region, group, head)
        if not made_whole and gains_memory and together <= REPEATED and not _repeats_gradients(more, whole=1):
            found = more
    return found


def _readers(cuts: Collection[Selection]) -> set[fx.Node]:
    """What reads a value for these selections only; a split where each of its pieces is one."""
    nodes = {c.node for c in cuts}
    return {c.reader for c in cuts if c.node is c.reader or nodes.issuperset(c.reader.users)}


def _read_whole(cut: Selection) -> Refusal:
    return refuse(
        "select",
        cut.node,
        f"{cut.value.name} is read whole as well as selected from, so its head cannot run on the selected tokens only",
        "do not return the logits beside the loss, or name them in options['unused_outputs']",
    )


def _values(group: Iterable[Selection]) -> list[fx.Node]:
    return list(dict.fromkeys(c.value for c in group))


def gains(region: Region, group: list[Selection], head: Collection[fx.Node]) -> bool:
    """Whether the head makes more than it reads; or losses, of values that are more than it reads."""
    if not any(map(is_heavy, head)):
        return False
    made = sum(map(nbytes, _values(group)))
    narrow = NARROW * made < read_by(region, head) < max(map(nbytes, head))
    return narrow or _is_wide(region, group, head)


def _is_wide(region: Region, group: list[Selection], head: Collection[fx.Node]) -> bool:
    """Whether what is selected from is more than what it is made of."""
    return read_by(region, head) < sum(map(nbytes, _values(group)))


def _share(group: list[Selection], unknown: float = 0.0) -> float:
    """How much of the rows is selected. unknown: what counts where data decide; a mask selects at most all."""
    cut = group[0]
    if _decided_by_data(cut):
        return unknown
    whole = cut.value.meta["val"].shape[cut.first : cut.first + cut.count]
    return math.prod(map(hint, cut.lengths)) / max(math.prod(map(hint, whole)), 1)


def _decided_by_data(cut: Selection) -> bool:
    return not all(map(is_seen, cut.lengths))


def _repeats_work(heads: list[Head]) -> bool:
    """Whether a product would run on more rows than there are: on some twice, for several selections of its result."""
    shares: dict[fx.Node, float] = {}
    for group, head in heads:
        for node in filter(is_heavy, head):
            shares[node] = shares.get(node, 0.0) + _share(group)
    return any(share > 1 for share in shares.values())


def _repeats_gradients(heads: list[Head], whole: int = 0) -> bool:
    """Whether gradients of weights that several heads share would outweigh the values that are no longer made whole.

    whole: how often the heads run on all rows besides.
    """
    read = Counter(i for _, h in heads for i in {i for n in h for i in n.all_input_nodes})
    weights = [i for i in read if i.meta.get("held") and i.meta["needs_grad"]]
    more = sum((read[i] - 1 + whole) * nbytes(i) for i in weights)
    return more > sum(nbytes(v) for g, _ in heads for v in _values(g))


def _site(axes: Axes, group: list[Selection], head: Collection[fx.Node]) -> SelectSite | Refusal:
    cut, rows = group[0], row_axes(axes, group[0])
    assert rows is not None
    asking = next((n for n in head if n.target in _ASK_FOR_ROWS), None)
    if asking is not None and _decided_by_data(cut):
        return refuse("select", cut.node, f"{asking.name} cannot be traced for as many tokens as data decide")
    nodes: dict[fx.Node, Places] = {}
    reads: dict[fx.Node, tuple[Places, ...]] = {}
    for node in (n for n in cut.node.graph.nodes if n in head):
        proofs = [p for a in rows if isinstance(p := axes.tokenwise(node, a), Tokenwise)]
        if len(proofs) < len(rows):
            return refuse("select", cut.node, f"{node.name}, on the way to it, does not treat each row by itself")
        nodes[node] = tuple(p.place for p in proofs)
        reads[node] = tuple(_standing(p.needs[i] for p in proofs) for i in range(len(proofs[0].needs)))
        for operand, places in zip(operands_of(node), reads[node], strict=False):
            if places and operand not in head and not _can_select(operand, places, rows):
                told = f"the rows of {operand.name} do not stand as those of {cut.value.name} do"
                return refuse("select", cut.node, told)
    return SelectSite(tuple(group), nodes, reads)


def _standing(places: Iterable[Place | None]) -> Places:
    return tuple(p for p in places if p is not None)


def _can_select(operand: fx.Node, places: Places, rows: Sequence[Axis]) -> bool:
    return len(places) == len(rows) and Rows(shape_of(operand.meta["val"]), places).adjacent


def apply(editor: Editor, site: SelectSite, ctx: Context) -> None:
    cut = site.cuts[0]
    made: dict[tuple[fx.Node, Places], fx.Node] = {}
    for node in site.nodes:
        for operand, places in zip(operands_of(node), site.reads[node], strict=False):
            if places and operand not in site.nodes and (operand, places) not in made:
                source = editor.resolve(operand)
                rows = Rows(shape_of(source.meta["val"]), places)
                made[operand, places] = select(editor, cut, source, rows)
    values: dict[fx.Node, fx.Node] = {}
    for node in site.nodes:
        values[node] = _copied(editor, site, node, values, made)
    for equal in site.cuts:
        _replace(editor, equal, values[equal.value])


def _copied(
    editor: Editor,
    site: SelectSite,
    node: fx.Node,
    values: Mapping[fx.Node, fx.Node],
    made: Mapping[tuple[fx.Node, Places], fx.Node],
) -> fx.Node:
    """A node of the head on the selected rows."""
    cut = site.cuts[0]
    places = iter(site.reads[node])

    def lookup(source: fx.Node) -> fx.Node:
        standing = next(places, ()) if isinstance(source.meta.get("val"), torch.Tensor) else ()
        if source in values:
            return values[source]
        return made[source, standing] if standing else editor.resolve(source)

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lookup)
    target: Any = node.target
    if takes_shape(target):
        shape = Rows(shape_of(node.meta["val"]), site.nodes[node]).resized(product(cut.taken))
        numbers = [editor.number(n, like=cut.node) for n in shape]
        target, args, kwargs = with_shape(target, args, kwargs, numbers)
    return editor.call(target, args, kwargs, like=node, before=cut.node)


def _replace(editor: Editor, cut: Selection, value: fx.Node) -> None:
    """Let the value made of selected rows stand for a selection; what asks for its size asks the rows."""
    new = reshape(editor, value, shape_of(cut.node.meta["val"]), cut.node)
    for user in [u for u in cut.node.users if u.target is aten.sym_size.int]:
        length = editor.number(size(user.meta["val"]), like=user)
        editor.replace(user, length, "the length of a selection is read off its inputs")
    editor.replace(cut.node, new, f"the selection of {product(cut.taken)} tokens moves before the head")


SELECT = Pass("select", "lm_head", Fidelity.ROUNDING, find, apply, repeats=True)
