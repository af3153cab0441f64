"""The driver: runs the passes in order, checks after each, and fills the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.fx as fx

from mstc.errors import StrictError
from mstc.graph.checker import check
from mstc.graph.describe import describe
from mstc.graph.editor import Editor
from mstc.options import Options
from mstc.passes.base import Context, Pass
from mstc.passes.masks import known_values
from mstc.passes.memory_budget import MEMORY_BUDGET
from mstc.passes.order import PASSES
from mstc.report import Edit, Fidelity, Refusal, Report


class Watcher(Protocol):
    """Sees the graph as it was captured and after each pass that ran; it changes nothing."""

    def start(self, gm: fx.GraphModule) -> None: ...

    def ran(self, step: Pass, gm: fx.GraphModule, done: Ran) -> None: ...


@dataclass(frozen=True)
class Ran:
    """What one pass did: whether it changed the graph, in how many seconds, by which edits, and what it refused."""

    changed: bool
    seconds: float
    edits: tuple[Edit, ...]
    refusals: tuple[Refusal, ...]


def run(gm: fx.GraphModule, ctx: Context, report: Report, watchers: Sequence[Watcher] = ()) -> None:
    """Apply every enabled pass to the graph, in place.

    Raises `StrictError` where ``strict`` is set and a pass that was asked for changed nothing.
    """
    editor = Editor(gm)
    for watcher in watchers:
        watcher.start(gm)
    for step in PASSES:
        if not step.runs(ctx.options):
            continue
        done = _run_one(step, editor, ctx, report)
        for watcher in watchers:
            watcher.ran(step, gm, done)
    report.edits = list(editor.edits)
    report.plan = list(ctx.plan)
    loops, masks = ctx.facts.get("loops", {}), ctx.facts.get("masks", {})
    report.regions = describe(gm, ctx.analysis(gm).regions, loops, masks, known_values(gm, ctx))
    hold_to_word(ctx.options, report)


def prepare(gm: fx.GraphModule, ctx: Context, report: Report) -> None:
    """Apply the passes that come before the choice of loops, in place."""
    editor = Editor(gm)
    for step in PASSES[: PASSES.index(MEMORY_BUDGET)]:
        if step.runs(ctx.options):
            _run_one(step, editor, ctx, report)


def _run_one(step: Pass, editor: Editor, ctx: Context, report: Report) -> Ran:
    started = time.perf_counter()
    edits, refusals = len(editor.edits), len(report.refusals)
    editor.pass_name = step.name
    changed = False
    while _apply_all(step, editor, ctx, report):
        changed = True
        if not step.repeats:
            break
        del report.refusals[refusals:]  # those of the last round stand
    seconds = time.perf_counter() - started
    report.timings[step.name] = seconds
    return Ran(changed, seconds, tuple(editor.edits[edits:]), tuple(report.refusals[refusals:]))


def _apply_all(step: Pass, editor: Editor, ctx: Context, report: Report) -> bool:
    """Rewrite every site that the pass finds in the graph as it is; whether there was one."""
    sites = []
    for found in step.find(editor.gm, ctx):
        if isinstance(found, Refusal):
            report.refusals.append(found)
        else:
            sites.append(found)
    for site in sites:
        step.apply(editor, site, ctx)
    if sites:
        editor.finish()
        ctx.edited()
        check(editor.gm)
        report.fidelity = Fidelity(max(report.fidelity, step.fidelity))
    return bool(sites)


def hold_to_word(options: Options, report: Report) -> None:
    """Raise `StrictError` where ``strict`` is set and a pass that was asked for changed nothing."""
    if not options.strict:
        return
    for name in sorted(options.asked):
        if any(edit.pass_name == name for edit in report.edits):
            continue
        refused = [r for r in report.refusals if r.pass_name in (name, "normal_form")]
        reasons = "; ".join(": ".join(filter(None, (_place(r), r.reason))) for r in refused)
        raise StrictError(
            f"options['strict'] is set and options[{name!r}] was asked for, but it changed nothing in this graph"
            + (f" ({reasons})" if reasons else " (it found no candidate)")
        )


def _place(refusal: Refusal) -> str:
    """The node and the source line, as far as they are known."""
    return " at ".join(filter(None, (refusal.node, refusal.source)))
