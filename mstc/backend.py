"""The entry point: ``torch.compile(fn, backend="mstc", options={...})``."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.assume import guarded, marked_inputs, marking, offered_buffers
from mstc.compat import autocast, building
from mstc.dump.environment import versions
from mstc.dump.observer import Observer, observe
from mstc.graph.normal_form import NormalForm, NotNormalError, normalize
from mstc.graph.results import returned_by
from mstc.lower import body_compiler, budget_settings, lower, mode_settings
from mstc.ops import flops, loop, program
from mstc.options import Options, parse_options
from mstc.passes.base import Context
from mstc.passes.loops import has_loops
from mstc.pipeline import hold_to_word, run
from mstc.plan.around import lowered_around
from mstc.report import Refusal, Report, record
from mstc.verify import Copying, verifying

__all__ = ["flops", "loop", "mstc"]


def mstc(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Rewrite one graph of Dynamo's and compile it.

    options: see `mstc.options`; mode: as of ``torch.compile``, for the outer compilation.
    Raises `mstc.OptionError` on a bad option, `mstc.StrictError` under ``strict``, `mstc.PlanError` where no plan meets
    ``memory_budget``; under ``verify`` the first call may raise `mstc.VerificationError`. Dynamo wraps what is raised
    here in its own BackendCompilerFailed, which tells the message.
    """
    chosen = parse_options(options)
    started = time.perf_counter()
    report = Report(graph=compat.compile_name(), options=chosen.to_dict(), versions=versions())
    observer = observe(chosen, report)
    with building.old_objects_set_aside():
        try:
            form = normalize(gm, inputs)
        except NotNormalError as e:
            report.refusals.append(Refusal("normal_form", e.node, e.source, e.reason, e.remedy))
            hold_to_word(chosen, report)
            observer.left(gm)
            form = None
        report.timings["normal_form"] = time.perf_counter() - started
        if form is None:
            compiled = _plain(gm, inputs, chosen, mode)
        else:
            compiled = _rewritten(gm, form, inputs, chosen, mode, report, observer)
    report.timings["total"] = time.perf_counter() - started
    record(report)
    observer.publish()
    return compiled


def _plain(gm: fx.GraphModule, inputs: Sequence[Any], options: Options, mode: str | None) -> Callable[..., Any]:
    """The graph as it came."""
    return lower(gm, inputs, options.lower, mode_settings(mode))


def _kernels_of(options: Options, inputs: Sequence[Any]) -> AbstractContextManager[None]:
    """What a graph is compiled in: on the CPU its kernels are built while other parts of it are lowered."""
    devices = {x.device.type for x in inputs if isinstance(x, torch.Tensor)}
    return building.built_together() if options.lower == "inductor" and devices <= {"cpu"} else nullcontext()


def _rewritten(
    original: fx.GraphModule,
    form: NormalForm,
    inputs: Sequence[Any],
    options: Options,
    mode: str | None,
    report: Report,
    observer: Observer,
) -> Callable[..., Any]:
    """The graph after all passes, compiled, with the checks that the passes and the options ask for."""
    copying = Copying() if options.verify else None
    watchers = [w for w in (copying, observer.watch(form.training)) if w is not None]
    ctx = Context(options, form.training, compile_body=body_compiler(options.lower))
    ctx.facts["inputs"] = dict(offered_buffers(form.gm, inputs))
    ctx.facts["marked"] = dict(marked_inputs(form.gm, inputs))
    with autocast.off_at_run_time(), _kernels_of(options, inputs):
        run(form.gm, ctx, report, watchers)
        observer.rewritten(form.gm)
        settings = mode_settings(mode, report if has_loops(form.gm) else None) | budget_settings(options)
        report.around = lowered_around(form.gm, options, mode)
        compiled = lower(form.gm, inputs, report.around or options.lower, settings)
    if copying is not None:
        compiled = verifying(compiled, copying.copies, list(ctx.facts.get("dropped", {}).values()))
    compiled = autocast.running_without(compiled)
    outputs = returned_by(form.gm.graph)
    marks = {i: ctx.facts["output_marks"][n] for i, n in enumerate(outputs) if n in ctx.facts.get("output_marks", {})}
    if marks:
        compiled = marking(compiled, marks)
    assumed = ctx.facts.get("assumed", {})
    if assumed:
        positions = {n: i for i, n in enumerate(form.gm.graph.find_nodes(op="placeholder"))}
        checks = {positions[n]: a for n, a in assumed.items()}
        compiled = guarded(compiled, checks, lambda given: _plain(original, given, options, mode))
    return compiled


mstc.reset = program.clear  # type: ignore[attr-defined]
