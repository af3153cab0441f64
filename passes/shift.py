"""A slice of the logits' tokens moves before the head: f(x)[:, a:b] = f(x[:, a:b]) for tokenwise f.

``logits[:, :-1]`` against ``labels[:, 1:]`` is how many losses are shifted; the slice would part the head
from its loss and keep all logits. Exact up to the shape of the matrix products, so equal up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.axes import Axes
from mstc.graph.costs import is_heavy, nbytes
from mstc.graph.editor import Editor
from mstc.graph.places import Place
from mstc.graph.regions import Region, find_regions, make_region
from mstc.graph.rules.call import Call
from mstc.ops.body import LENGTH, dynamic_lengths, forward_body
from mstc.passes.base import Context, Pass, refuse
from mstc.plan.split import head_of
from mstc.report import Fidelity, Refusal

aten = torch.ops.aten


@dataclass(frozen=True)
class ShiftSite:
    """head: the region that makes the sliced value; cut: the slice; start, length: of tokens it takes."""

    head: Region
    cut: fx.Node
    start: int
    length: int


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[ShiftSite | Refusal]:
    if not gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        return
    axes = Axes(gm.graph)
    for region in find_regions(gm.graph, axes):
        for value, place in region.outputs:
            yield from _site(axes, region, value, place)


def _site(axes: Axes, region: Region, value: fx.Node, place: Place) -> Iterator[ShiftSite | Refusal]:
    cuts = [u for u in value.users if _slices(u, place)]
    if not cuts:
        return
    if dynamic_lengths(region):
        yield refuse("shift", cuts[0], "the length is dynamic", "shift the labels instead of the logits")
        return
    head = head_of(region, [value])
    if not any(is_heavy(n) for n in head):
        return
    sources = {i for n in head for i in n.all_input_nodes if i in region.proofs and i not in head}
    if sum(map(nbytes, sources)) >= nbytes(value):
        return
    if len(value.users) > 1 or any(u not in head and u not in cuts for n in head for u in n.users):
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
    start, stop = _range(cuts[0], region.n)
    yield ShiftSite(part, cuts[0], start, stop - start)


def _slices(node: fx.Node, place: Place) -> bool:
    """Whether the node takes a stretch of the tokens that stand at ``place``."""
    if node.target is not aten.slice.Tensor or place.outer != 1 or place.inner != 1:
        return False
    call = Call(node)
    bounds = (call.arg("start"), call.arg("end"))
    return call.dim() == place.dim and call.arg("step", 1) == 1 and all(b is None or isinstance(b, int) for b in bounds)


def _range(node: fx.Node, n: int) -> tuple[int, int]:
    call = Call(node)
    start, stop, _ = slice(call.arg("start"), call.arg("end")).indices(n)
    return start, max(stop, start)


def apply(editor: Editor, site: ShiftSite, ctx: Context) -> None:
    body = forward_body(site.head, {LENGTH: site.length})
    placeholders = body.graph.find_nodes(op="placeholder")
    like = site.head.nodes[0]
    values: dict[fx.Node, Any] = {}
    for slot, (node, place) in zip(placeholders, site.head.tokens, strict=False):
        args = (editor.resolve(node), place.dim, site.start, site.start + site.length)
        values[slot] = editor.call(aten.slice.Tensor, args, like=like)
    for slot, node in zip(placeholders[len(site.head.tokens) :], site.head.shared, strict=True):
        values[slot] = editor.resolve(node)
    calls = [n for n in body.graph.nodes if n.op == "call_function"]
    for old, new in zip(site.head.nodes, calls, strict=True):
        args, kwargs = fx.node.map_arg((new.args, dict(new.kwargs)), values.__getitem__)
        values[new] = editor.call(new.target, args, kwargs, like=old, before=site.cut)
    editor.replace(site.cut, values[calls[-1]], f"the slice of {site.length} tokens moves before the head")


SHIFT = Pass("shift", "lm_head", Fidelity.ROUNDING, find, apply)
