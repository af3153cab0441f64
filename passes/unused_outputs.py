"""Outputs that the caller never reads become an expanded nan: no memory, and loud if read after all.

Approximate in that one respect, and only for the outputs named; everything else is unchanged. One in half precision
becomes float32: whoever casts all outputs to float32, as Accelerate does, would otherwise write the whole of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx

from mstc.errors import OptionError
from mstc.graph.editor import Editor
from mstc.graph.precision import at_least_float32
from mstc.graph.results import returned_by
from mstc.graph.sizes import shape_of
from mstc.passes.base import Context, Pass
from mstc.report import Fidelity

aten = torch.ops.aten


@dataclass(frozen=True)
class UnusedSite:
    """Position of an output to drop, and its node."""

    position: int
    node: fx.Node


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[UnusedSite]:
    outputs = returned_by(gm.graph)
    for wanted in ctx.options.unused_outputs:
        position = wanted if isinstance(wanted, int) else _by_name(outputs, wanted)
        if not -len(outputs) <= position < len(outputs):
            raise OptionError(
                f"options['unused_outputs'] holds {wanted}, but this graph has {len(outputs)} outputs: "
                f"{_names(outputs)}"
            )
        node = outputs[position]
        if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
            raise OptionError(f"options['unused_outputs']: output {wanted} is no tensor; outputs: {_names(outputs)}")
        if not node.meta["val"].is_floating_point():
            raise OptionError(
                f"options['unused_outputs']: output {wanted} has dtype {node.meta['val'].dtype}, which cannot hold the "
                f"nan that marks it as dropped; name floating-point outputs only. Outputs: {_names(outputs)}"
            )
        yield UnusedSite(position % len(outputs), node)


def _by_name(outputs: list[object], name: str) -> int:
    found = [i for i, n in enumerate(outputs) if isinstance(n, fx.Node) and n.name == name]
    if len(found) != 1:
        what = "matches no output" if not found else f"matches {len(found)} outputs"
        raise OptionError(f"options['unused_outputs']: {name!r} {what}; outputs: {_names(outputs)}")
    return found[0]


def _names(outputs: list[object]) -> str:
    return ", ".join(f"{i}: {n}" for i, n in enumerate(outputs))


def apply(editor: Editor, site: UnusedSite, ctx: Context) -> None:
    value = site.node.meta["val"]
    dtype = at_least_float32(value.dtype)
    nan = editor.call(aten.full.default, ([], float("nan")), {"dtype": dtype, "device": value.device}, like=site.node)
    shape = [editor.number(n, like=site.node) for n in shape_of(value)]
    nothing = editor.call(aten.expand.default, (nan, shape), like=site.node)
    outputs = returned_by(editor.gm.graph)
    outputs[site.position] = nothing
    ctx.facts.setdefault("dropped", {})[nothing] = site.position
    editor.set_outputs(outputs, f"output {site.position} ({site.node.name}) dropped as unused")


UNUSED_OUTPUTS = Pass("unused_outputs", "", Fidelity.EXACT, find, apply)
