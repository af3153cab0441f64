"""Lowering: the rewritten graph, and the bodies of its loops, go to Dynamo's own backends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.graph.views import any_strides
from mstc.ops.locality import near_readers
from mstc.ops.products import fast_products
from mstc.ops.saved import offload_saved, tags_of
from mstc.ops.workspace import empty_strided
from mstc.options import Options
from mstc.report import Refusal, Report


def lower(
    gm: fx.GraphModule, inputs: Sequence[Any], name: str, settings: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph with "inductor", "aot_eager" or "eager"; inputs may be fake.

    settings: of Inductor's configuration, for this graph only.
    """
    if name == "eager":
        return gm.forward
    compat.name_constants(gm)
    patches = {"config_patches": settings} if settings and name == "inductor" else {}
    tags = tags_of(gm)
    backend = compat.partitioning_by(name, offload_saved, tags) if tags else compat.lower_with(name)
    with compat.allocating_by(empty_strided), fast_products(), any_strides(gm):
        compiled: Callable[..., Any] = backend(gm, list(inputs), **patches)
    return compiled


def mode_settings(mode: str | None, looping: Report | None = None) -> dict[str, Any]:
    """Inductor's settings for a ``mode`` of ``torch.compile``; a graph with loops gets no CUDA graph.

    looping: the report of a graph with loops, which gets a refusal where CUDA graphs were asked for.
    """
    if mode in (None, "default"):
        return {}
    settings = compat.mode_settings(mode)
    if looping is not None and settings.pop("triton.cudagraphs", False):
        looping.refusals.append(
            Refusal(
                "lower",
                "",
                "",
                f"mode {mode!r} asks for CUDA graphs, which are switched off for a graph with loops",
                'set options={"mini_sequence": False, "lm_head": False, "query_chunks": False} to have CUDA graphs',
            )
        )
    return settings


def budget_settings(options: Options) -> dict[str, Any]:
    """Inductor's settings for a graph that was planned: a buffer goes when its last reader has run.

    Inductor would rather keep one that a later kernel can take, which loops between the two know nothing of: up to
    1.15 times the peak with experts.
    """
    return {} if options.memory_budget is None else {"allow_buffer_reuse": False}


def body_compiler(name: str) -> Callable[[fx.GraphModule, Sequence[torch.Tensor]], Callable[..., Any]]:
    """Compiles loop bodies: plain functions of tensors, without gradients, one after another.

    They are ATen ops without mutation already, so only Inductor has anything to do. A body says in its
    ``meta["settings"]`` what of Inductor's configuration it needs, if anything. Its nodes are brought near to their
    readers here (`mstc.ops.locality`), not by Inductor.
    """

    def compile_body(gm: fx.GraphModule, fakes: Sequence[torch.Tensor]) -> Callable[..., Any]:
        if name != "inductor":
            return gm.forward
        mode = compat.fake_mode_of_values(fakes)
        with (
            compat.isolated_tracing(mode),
            compat.without_cudagraphs(),
            torch.no_grad(),
        ):
            settings = {"reorder_for_locality": False, **gm.meta.get("settings", {})}
            return lower(near_readers(gm), fakes, name, settings)

    return compile_body
