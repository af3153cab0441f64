"""``mstc.explain``: what the backend would do with a call, without compiling or running anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mstc import compat
from mstc.assume import offered_buffers
from mstc.compat import autocast
from mstc.dump.environment import command_line, versions
from mstc.dump.files import Drawn
from mstc.dump.model import Dump, GraphDump
from mstc.dump.nodes import short
from mstc.dump.recorder import Recording, left_as_it_came
from mstc.graph.normal_form import NotNormalError, normalize
from mstc.ops import loop
from mstc.options import Options, parse_options
from mstc.passes.base import Context, not_compiled
from mstc.pipeline import hold_to_word, run
from mstc.plan.around import lowered_around
from mstc.report import Fidelity, Refusal, Report

__all__ = ["explain", "explained", "loop"]  # loop: the passes put its ops into graphs


def explain(fn: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any) -> Report:
    """What ``torch.compile(fn, backend="mstc", options=options)(*args, **kwargs)`` would do.

    Nothing is compiled and no graph runs, so that the tensors may be fake or on the meta device. Where the
    function has graph breaks, the report tells of all its graphs, and the code between them runs on zeros.
    ``report.save(folder)`` writes text, JSON and one HTML page. Raises `OptionError` on a bad option,
    TypeError where ``fn`` is no function, and whatever ``fn`` raises.
    """
    if not callable(fn):
        raise TypeError(f"mstc.explain needs a function or module and its arguments, got {type(fn).__name__}")
    report, dump = explained(fn, args, kwargs, parse_options(options), command_line())
    report.drawing = Drawn(dump)
    return report


def explained(
    fn: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], options: Options, command: str
) -> tuple[Report, Dump]:
    """The report of a call and the dump behind it."""
    started = time.perf_counter()
    reports: list[Report] = []
    graphs: list[GraphDump] = []

    def seen(captured: compat.Captured) -> None:
        report = Report(graph=f"graph {len(reports)}", options=options.to_dict(), versions=versions())
        graphs.append(replace(_explain_graph(captured, options, report), broken=short(captured.broken, 2000)))
        reports.append(report)

    compat.capture(fn, args, kwargs, seen)
    title = short(getattr(fn, "__name__", type(fn).__name__))
    seconds = time.perf_counter() - started
    whole = _together(title, options, reports)
    whole.timings["total"] = seconds
    return whole, Dump(title, command, options.to_dict(), versions(), tuple(graphs), seconds)


def _explain_graph(captured: compat.Captured, options: Options, report: Report) -> GraphDump:
    started = time.perf_counter()
    if captured.broken:
        first = captured.broken.splitlines()[0]
        remedy = "keep that line out of the compiled function; what follows is a graph of its own"
        report.refusals.append(Refusal("capture", "", captured.source, f"the graph ends here: {first}", remedy))
    try:
        form = normalize(captured.gm, captured.inputs)
    except NotNormalError as e:
        report.refusals.append(Refusal("normal_form", e.node, e.source, e.reason, e.remedy))
        hold_to_word(options, report)
        return left_as_it_came(captured.gm, report)
    report.timings["normal_form"] = time.perf_counter() - started
    recording = Recording(form.training)
    ctx = Context(options, form.training, compile_body=not_compiled, explained=True)
    ctx.facts["inputs"] = dict(offered_buffers(form.gm, captured.inputs))
    with autocast.off_at_run_time():
        run(form.gm, ctx, report, [recording])
    report.around = lowered_around(form.gm, options)
    return recording.finish(form.gm, report)


def _together(title: str, options: Options, reports: Sequence[Report]) -> Report:
    """One report of a call that has several graphs."""
    whole = Report(graph=title, options=options.to_dict(), versions=versions())
    for report in reports:
        whole.regions += report.regions
        whole.refusals += report.refusals
        whole.edits += report.edits
        whole.plan += report.plan
        whole.around = whole.around or report.around
        whole.fidelity = Fidelity(max(whole.fidelity, report.fidelity))
        for name, seconds in report.timings.items():
            whole.timings[name] = whole.timings.get(name, 0.0) + seconds
    return whole
