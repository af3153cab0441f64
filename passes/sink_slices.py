"""A slice of the logits moves behind its loss, where all logits are read too or other slices overlap it.

    g(f(x)[a:b], y) = g(f(x), y')[a:b]     for g that treats tokens one by one and y' with y'[a:b] = y
    sum(z[a:b]) = sum_t [a <= t < b] z_t

`select` would run the head on some tokens twice; so the head runs once over all of them, and each loss leaves out the
tokens that it does not take. Of these y' is that of the nearest token taken, so but for the logits themselves g is
asked nothing new. Their z_t enters no number (``where``), and its gradient stops in front of g:
``where(taken, v, detach(v))`` is v, and hands on 0 where nothing is taken, whatever the derivative of g is there. So g
may read no weight. Equal up to rounding: sums have other zeros among them.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.axes import Axes, Axis, NotTokenwise, Tokenwise
from mstc.graph.costs import nbytes
from mstc.graph.editor import Editor, has_order
from mstc.graph.places import Place
from mstc.graph.regions import Region
from mstc.graph.rules.call import operands_of
from mstc.graph.selections import Rows, Selection, about_logits, reshape, row_axes, select, selections_of
from mstc.graph.sizes import Size, same, shape_of
from mstc.ops.body import takes_shape, with_shape
from mstc.passes.base import Context, Pass, refuse
from mstc.passes.select import NARROW, gains
from mstc.passes.token_losses import MEANS, mean_as_sum
from mstc.plan.split import head_of
from mstc.report import Fidelity, Refusal

aten = torch.ops.aten


@dataclass(frozen=True)
class SinkSite:
    """A slice, and what is made of it token by token.

    start, step: of the slice; proofs: the nodes behind it, in order, along the slice's own axis; sums: sums and means
    over that axis, which end it; kept: what others read besides.
    """

    cut: Selection
    start: int
    step: int
    proofs: Mapping[fx.Node, Tokenwise]
    sums: tuple[fx.Node, ...]
    kept: tuple[fx.Node, ...]


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[SinkSite | Refusal]:
    known = ctx.analysis(gm)
    refusals: list[Refusal] = []
    for region in known.regions:
        for cut in _slices(known.axes, region):
            axis = _own_axis(known.axes, cut)
            stretch = _start_and_step(cut)
            if axis is not None and stretch is not None:
                found = _site(known.axes, cut, axis, *stretch)
                if isinstance(found, SinkSite):
                    yield found
                else:
                    refusals.append(found)
    yield from about_logits(gm.graph, refusals)


def _slices(axes: Axes, region: Region) -> Iterator[Selection]:
    """Slices of wide results of the region's products along its axis."""
    for value, _ in region.outputs:
        for cut in (c for u in value.users if u not in region.proofs for c in selections_of(u, value)):
            rows = row_axes(axes, cut) if cut.target is aten.slice.Tensor else None
            if rows and axes.find(region.axis) in rows and gains(region, [cut], head_of(region, [value])):
                yield cut


def _own_axis(axes: Axes, cut: Selection) -> Axis | None:
    """The axis that the slice made."""
    found = [
        a for a in axes.of(cut.node) for p in axes.places(cut.node, a) if p.dim == cut.first and same(p.n, cut.taken[0])
    ]
    return found[0] if len(found) == 1 and not same(cut.taken[0], 0) else None


def _start_and_step(cut: Selection) -> tuple[int, int] | None:
    """Which tokens are taken, where the graph tells it in numbers."""
    start, _, step = (*cut.given, None, None, None)[:3]
    start, step, length = start or 0, step or 1, cut.before[0]
    if not isinstance(start, int) or not isinstance(step, int) or (start < 0 and not isinstance(length, int)):
        return None
    return (start if start >= 0 else max(start + length, 0)), step


def _site(axes: Axes, cut: Selection, axis: Axis, start: int, step: int) -> SinkSite | Refusal:
    proofs: dict[fx.Node, Tokenwise] = {}
    sums: list[fx.Node] = []
    kept: dict[fx.Node, None] = {}
    for node in cut.node.graph.nodes:
        if not any(i is cut.node or i in proofs for i in node.all_input_nodes):
            continue
        proof = axes.tokenwise(node, axis)
        if node.op == "call_function" and not has_order(node) and isinstance(proof, Tokenwise):
            proofs[node] = proof
        elif _sums(node, proof, proofs):
            sums.append(node)
        else:
            kept |= dict.fromkeys(i for i in node.all_input_nodes if i in proofs or i is cut.node)
    wide = next((n for n in kept if NARROW * nbytes(n) > nbytes(cut.value)), None)
    if wide is not None:
        return refuse("sink_slices", cut.node, f"{wide.name}, made of all classes of the slice, is read whole")
    for node, proof in proofs.items():
        for operand, need in zip(operands_of(node), proof.needs, strict=False):
            if operand in proofs or _whole_of(operand, cut) is not None:
                continue
            if need is None and operand.meta.get("needs_grad"):
                return refuse(
                    "sink_slices", cut.node, f"{node.name} reads {operand.name}, which gets a gradient of each token"
                )
            if need is not None and NARROW * nbytes(operand) > nbytes(cut.value):
                return refuse(
                    "sink_slices", cut.node, f"{node.name} reads {operand.name}, which is as wide, at other tokens"
                )
    return SinkSite(cut, start, step, proofs, tuple(sums), tuple(kept))


def _sums(node: fx.Node, proof: Tokenwise | NotTokenwise, proofs: Mapping[fx.Node, Tokenwise]) -> bool:
    if not isinstance(proof, NotTokenwise) or len(operands_of(node)) != 1 or node.args[0] not in proofs:
        return False
    return proof.sums or node.target in MEANS


def _whole_of(operand: fx.Node, cut: Selection) -> fx.Node | None:
    """What the operand is the same slice of."""
    reader = operand.args[0] if operand.target is operator.getitem else operand
    if not isinstance(reader, fx.Node) or not reader.args or not isinstance(reader.args[0], fx.Node):
        return None
    found = (c for c in selections_of(reader, reader.args[0]) if c.node is operand)
    return next((c.value for c in found if c.alike() == cut.alike()), None)


def apply(editor: Editor, site: SinkSite, ctx: Context) -> None:
    whole = _Whole(editor, site)
    for node in site.proofs:
        whole.copy(node)
    for node in site.sums:
        editor.replace(
            node, whole.sum(node), f"a sum over {site.cut.taken[0]} tokens of all logits leaves the others out"
        )
    for node in site.kept:
        editor.replace(node, whole.slice(node), "a slice of the logits moves behind what is made of it")


class _Whole:
    """The nodes behind a slice, made for all tokens."""

    def __init__(self, editor: Editor, site: SinkSite) -> None:
        self._editor, self._site = editor, site
        self._length, taken = site.cut.before[0], site.cut.taken[0]
        device = site.cut.value.meta["val"].device
        at = self._call(aten.arange.default, editor.number(self._length, like=site.cut.node), device=device)
        nearest = self._call(
            aten.div.Tensor_mode, self._call(aten.sub.Tensor, at, site.start), site.step, rounding_mode="floor"
        )
        nearest = self._call(aten.clamp.default, nearest, 0, editor.number(taken - 1, like=site.cut.node))
        own = self._call(aten.add.Tensor, self._call(aten.mul.Tensor, nearest, site.step), site.start)
        self._taken = self._call(aten.eq.Tensor, own, at)
        self._made: dict[fx.Node, fx.Node] = {}
        self._read: dict[tuple[fx.Node, Place], fx.Node] = {}

    def copy(self, node: fx.Node) -> None:
        """Make the node for all tokens."""
        proof = self._site.proofs[node]
        needs = iter(proof.needs)

        def lookup(source: fx.Node) -> fx.Node:
            need = next(needs, None) if isinstance(source.meta.get("val"), torch.Tensor) else None
            if source in self._made:
                return self._made[source]
            return self._aligned(source, need) if need is not None else self._editor.resolve(source)

        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lookup)
        target = node.target
        if takes_shape(target):
            shape = self._numbers(self._shape(node, proof.place))
            target, args, kwargs = with_shape(target, args, kwargs, shape)
        self._made[node] = self._editor.call(target, args, kwargs, like=node)  # type: ignore[arg-type]

    def sum(self, node: fx.Node) -> fx.Node:
        """The sum or mean without the tokens that the slice does not take."""
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        each, place = self._made[source], self._site.proofs[source].place
        counted = self._editor.call(aten.where.ScalarOther, (self._mask(each, place), each, 0), like=node)
        if node.target in MEANS:
            return mean_as_sum(self._editor, node, counted)
        return self._editor.call(node.target, (counted, *node.args[1:]), node.kwargs, like=node)  # type: ignore[arg-type]

    def slice(self, node: fx.Node) -> fx.Node:
        """The tokens that the slice takes."""
        made, place = self._made[node], self._site.proofs[node].place
        rows = Rows(shape_of(made.meta["val"]), (replace(place, n=self._length),))
        taken = select(self._editor, self._site.cut, made, rows)
        return reshape(self._editor, taken, shape_of(node.meta["val"]), node)

    def _aligned(self, source: fx.Node, place: Place) -> fx.Node:
        """What the stretch reads of each token, at all of them; with no gradient where the slice takes none."""
        if (source, place) not in self._read:
            whole = _whole_of(source, self._site.cut)
            found = self._editor.resolve(whole) if whole is not None else self._nearest_of(source, place)
            if found.meta.get("needs_grad"):
                cut_off = self._call(aten.detach.default, found)
                found = self._call(aten.where.self, self._mask(found, place), found, cut_off)
            self._read[source, place] = found
        return self._read[source, place]

    def _nearest_of(self, source: fx.Node, place: Place) -> fx.Node:
        """The first token's value up to it, each token's until the next, the last one's to the end.

        Put together of copies: Inductor fails on positions that are rounded and clamped (`index_select` by them).
        """
        rows = Rows(shape_of(source.meta["val"]), (place,))
        like, step, length = self._site.cut.node, self._site.step, self._length
        lined = reshape(self._editor, self._editor.resolve(source), (rows.ahead, place.n, rows.stride), like)

        def copies(of: fx.Node, count: Size) -> fx.Node:
            return self._call(aten.expand.default, of, self._numbers((rows.ahead, count, rows.stride)))

        parts = [copies(self._call(aten.slice.Tensor, lined, 1, 0, 1), self._site.start)] if self._site.start else []
        repeated = lined if step == 1 else self._call(aten.repeat_interleave.self_int, lined, step, 1)
        parts += [repeated, copies(self._call(aten.slice.Tensor, lined, 1, -1), length)]
        whole = self._call(aten.cat.default, parts, 1)
        read = self._call(aten.slice.Tensor, whole, 1, 0, self._editor.number(length, like=like))
        return reshape(self._editor, read, self._shape(source, place), like)

    def _mask(self, whole: fx.Node, place: Place) -> fx.Node:
        """Which tokens are taken, for a value that holds all of them at this place."""
        shape = shape_of(whole.meta["val"])
        mask = self._taken
        if not (same(place.outer, 1) and same(place.inner, 1)):
            mask = reshape(self._editor, mask, (1, self._length, 1), self._site.cut.node)
            mask = self._call(aten.expand.default, mask, self._numbers((place.outer, self._length, place.inner)))
        ones = len(shape) - place.dim - 1
        return reshape(self._editor, mask, (shape[place.dim], *[1] * ones), self._site.cut.node)

    def _shape(self, node: fx.Node, place: Place) -> tuple[Size, ...]:
        return Rows(shape_of(node.meta["val"]), (place,)).resized(self._length)

    def _numbers(self, shape: Sequence[Size]) -> list[Any]:
        return [self._editor.number(n, like=self._site.cut.node) for n in shape]

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self._editor.call(target, args, kwargs, like=self._site.cut.node)


SINK_SLICES = Pass("sink_slices", "lm_head", Fidelity.ROUNDING, find, apply)
