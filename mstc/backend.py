"""The entry point: ``torch.compile(fn, backend="mstc", options={...})``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx

from mstc.graph.normal_form import NotNormalError, normalize
from mstc.lower import body_compiler, lower, mode_settings
from mstc.ops import loop, program
from mstc.options import Options, parse_options
from mstc.passes.base import Context
from mstc.passes.loops import has_loops
from mstc.pipeline import run
from mstc.report import Refusal, Report, record
from mstc.verify import verifying

__all__ = ["loop", "mstc"]


def mstc(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Rewrite one graph of Dynamo's and compile it.

    options: see `mstc.options`; mode: as of ``torch.compile``, for the outer compilation.
    Raises `mstc.OptionError` on a bad option, `mstc.StrictError` under ``strict``.
    """
    chosen = parse_options(options)
    started = time.perf_counter()
    report = Report(options=chosen.to_dict(), versions={"torch": torch.__version__})
    stages: list[tuple[str, fx.GraphModule]] | None = [] if chosen.verify else None
    rewritten = _rewrite(gm, inputs, chosen, report, stages)
    dropped = [int(e.what.split()[1]) for e in report.edits if e.pass_name == "unused_outputs"]
    settings = mode_settings(mode, has_loops(rewritten), report)
    compiled = lower(rewritten, inputs, chosen.lower, settings)
    report.timings["total"] = time.perf_counter() - started
    record(report)
    return verifying(compiled, stages, dropped) if stages else compiled


def _rewrite(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Options,
    report: Report,
    stages: list[tuple[str, fx.GraphModule]] | None,
) -> fx.GraphModule:
    """The graph after all passes, or the graph as it came where it has no normal form."""
    started = time.perf_counter()
    try:
        form = normalize(gm, inputs)
    except NotNormalError as e:
        report.refusals.append(Refusal("normal_form", e.node, e.source, e.reason, e.remedy))
        return gm
    report.timings["normal_form"] = time.perf_counter() - started
    ctx = Context(options, form.training, compile_body=body_compiler(options.lower))
    ctx.facts["inputs"] = dict(zip(form.gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
    run(form.gm, ctx, report, stages)
    return form.gm


mstc.reset = program.clear  # type: ignore[attr-defined]
