"""The masks pass on one graph, and attention under masks that are built inside of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F

from mstc.graph.attention import attention_in
from mstc.graph.checker import check
from mstc.graph.editor import Editor
from mstc.graph.normal_form import normalize
from mstc.graph.predicates.facts import MaskFact
from mstc.options import Options
from mstc.passes.base import Context
from mstc.passes.masks import MASKS, Assumed, MaskSite
from mstc.report import Refusal


@dataclass
class Seen:
    """What the pass did to one graph."""

    before: fx.GraphModule
    after: fx.GraphModule
    sites: list[MaskSite]
    refusals: list[Refusal]
    facts: dict[fx.Node, MaskFact]
    assumed: dict[fx.Node, Assumed]
    inputs: list[Any] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        order = [n for n in self.after.graph.nodes if n in self.facts]
        return [self.facts[n].label for n in order]

    @property
    def attention(self) -> list[fx.Node]:
        return attention_in(self.after.graph)


def run_pass(gm: fx.GraphModule, inputs: list[Any], *, offer_buffers: bool = False) -> Seen:
    """Normal form and the pass on one Dynamo graph; the graph before is kept."""
    form = normalize(gm, inputs)
    ctx = Context(Options(), form.training)
    if offer_buffers:
        placeholders = form.gm.graph.find_nodes(op="placeholder")
        ctx.facts["inputs"] = {
            n: t for n, t in zip(placeholders, inputs, strict=True) if "_buffers_" in n.meta["user_name"]
        }
    before = copy.deepcopy(form.gm)
    found = list(MASKS.find(form.gm, ctx))
    assert str(before.graph) == str(form.gm.graph), "find changed the graph"
    sites = [f for f in found if isinstance(f, MaskSite)]
    editor = Editor(form.gm)
    for site in sites:
        MASKS.apply(editor, site, ctx)
    editor.finish()
    check(form.gm)
    assert len(editor.edits) == len(sites)
    refusals = [f for f in found if isinstance(f, Refusal)]
    return Seen(before, form.gm, sites, refusals, ctx.facts.get("masks", {}), ctx.facts.get("assumed", {}), inputs)


def compiled(fn: Callable[..., Any], *args: Any, dynamic: bool | None = None, offer_buffers: bool = False) -> Seen:
    """Compile and run ``fn`` with the pass; its result must be that of the function as it is written."""
    seen: list[Seen] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        seen.append(run_pass(gm, inputs, offer_buffers=offer_buffers))
        return seen[-1].after

    torch._dynamo.reset()
    result = torch.compile(fn, backend=backend, dynamic=dynamic)(*args)
    torch.testing.assert_close(result, fn(*args), rtol=1e-5, atol=1e-5)
    if not seen[0].attention:
        return next(s for s in seen if s.attention)
    return seen[0]


def same_numbers(seen: Seen) -> None:
    """Both graphs give the same values on the same inputs."""
    torch.testing.assert_close(list(seen.after(*seen.inputs)), list(seen.before(*seen.inputs)), rtol=1e-5, atol=1e-5)


def attend(build: Callable[[torch.Tensor], torch.Tensor | None], **kwargs: Any) -> Callable[..., torch.Tensor]:
    """Attention of q with itself under a mask built from q's length."""

    def fn(q: torch.Tensor, *more: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=build(q, *more), **kwargs)

    return fn


def causal(q: torch.Tensor) -> torch.Tensor:
    i = torch.arange(q.shape[-2])
    return i <= i[:, None]


def queries(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def band(q: torch.Tensor, length: int | None = None) -> torch.Tensor:
    distance = torch.arange(q.shape[-2])[:, None] - torch.arange(length or q.shape[-2])
    return (distance >= 0) & (distance < 4)
