"""A slice of the logits' tokens moves before the head: f(x)[:, a:b] = f(x[:, a:b]) for tokenwise f.

``logits[:, :-1]`` against ``labels[:, 1:]`` is how many losses are shifted; the slice would part the head
from its loss and keep all logits. Exact up to the shape of the matrix products, so equal up to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.axes import Axes
from mstc.graph.costs import is_heavy, nbytes
from mstc.graph.editor import Editor
from mstc.graph.places import Place
from mstc.graph.reach import ancestors
from mstc.graph.regions import Region, make_region
from mstc.graph.rules.call import Call
from mstc.graph.sizes import Size, shape_of
from mstc.ops.body import LENGTH, dynamic_lengths, forward_body
from mstc.passes.base import Context, Pass, refuse
from mstc.plan.split import head_of
from mstc.report import Fidelity, Refusal

aten = torch.ops.aten
_ARITHMETIC = (operator.add, operator.mul, operator.floordiv)  # of dynamic lengths


@dataclass(frozen=True)
class ShiftSite:
    """head: the region that makes the sliced value; cut: the slice; start, length: of tokens it takes."""

    head: Region
    cut: fx.Node
    start: Size
    length: Size


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[ShiftSite | Refusal]:
    if not gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        return
    known = ctx.analysis(gm)
    for region in known.regions:
        for value, place in region.outputs:
            yield from _site(known.axes, region, value, place)


def _site(axes: Axes, region: Region, value: fx.Node, place: Place) -> Iterator[ShiftSite | Refusal]:
    cuts = [u for u in value.users if _slices(u, place)]
    if not cuts:
        return
    head = head_of(region, [value])
    if not any(is_heavy(n) for n in head):
        return
    if not _gains(region, head, value):
        return
    head = _own(head, value)
    if len(value.users) > 1 or not any(is_heavy(n) for n in head) or not _gains(region, head, value):
        yield refuse(
            "shift",
            cuts[0],
            f"{value.name} is read whole as well as sliced, so its head cannot run on the slice only",
            "do not return the logits beside the loss, or name them in options['unused_outputs']",
        )
        return
    part = make_region(axes, region.axis, head, (), [value])
    if any(p.outer != 1 or p.inner != 1 for _, p in part.tokens):
        yield refuse("shift", cuts[0], "the tokens of the head's input share a dimension with another axis")
        return
    yield ShiftSite(part, cuts[0], *_range(cuts[0], region.n))


def _gains(region: Region, head: Collection[fx.Node], value: fx.Node) -> bool:
    """Whether what the head reads of its region is smaller than what it makes."""
    sources = {i for n in head for i in n.all_input_nodes if i in region.proofs and i not in head}
    return sum(map(nbytes, sources)) < nbytes(value)


def _own(head: Iterable[fx.Node], value: fx.Node) -> set[fx.Node]:
    """The part of the head that leads to ``value`` only; what others read too becomes an input of it."""
    own = set(head)
    while others := {n for n in own if n is not value and any(u not in own for u in n.users)}:
        own = ancestors([value], own - others)
    return own


def _slices(node: fx.Node, place: Place) -> bool:
    """Whether the node takes a stretch of the tokens that stand at ``place``."""
    if node.target is not aten.slice.Tensor or place.outer != 1 or place.inner != 1:
        return False
    call = Call(node)
    bounds = (call.arg("start"), call.arg("end"))
    return call.dim() == place.dim and call.arg("step", 1) == 1 and all(b is None or isinstance(b, int) for b in bounds)


def _range(node: fx.Node, n: Size) -> tuple[Size, Size]:
    """Start and length of the stretch."""
    call = Call(node)
    length = shape_of(node.meta["val"])[call.dim()]
    start = call.arg("start") or 0
    if isinstance(n, int):
        return slice(start, None).indices(n)[0], length
    return start if start >= 0 else n + start, length


def apply(editor: Editor, site: ShiftSite, ctx: Context) -> None:
    like, head = site.head.nodes[0], site.head
    start, stop, length = (editor.number(s, like=like) for s in (site.start, site.start + site.length, site.length))
    inputs: list[Any] = [
        editor.call(aten.slice.Tensor, (editor.resolve(node), place.dim, start, stop), like=like)
        for node, place in head.tokens
    ]
    inputs += [editor.resolve(node) for node in head.shared]
    symbols = dynamic_lengths(head)
    if symbols:
        inputs += [*(editor.length(s, like=like) for s in symbols), length]
    body = forward_body(head, None if symbols else {LENGTH: length})
    editor.replace(
        site.cut, _copied(editor, site, body, inputs), f"the slice of {site.length} tokens moves before the head"
    )


def _copied(editor: Editor, site: ShiftSite, body: fx.GraphModule, inputs: list[Any]) -> fx.Node:
    """The body's nodes in the graph, just before the slice; its last value."""
    values = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    originals = iter(site.head.nodes)
    value = site.cut
    for node in body.graph.nodes:
        if node.op != "call_function":
            continue
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
        like = site.cut if node.target in _ARITHMETIC else next(originals)
        value = values[node] = editor.call(node.target, args, kwargs, like=like, before=site.cut)
    return value


SHIFT = Pass("shift", "lm_head", Fidelity.ROUNDING, find, apply)
