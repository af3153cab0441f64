"""One choice of chunks, of what is kept and of what runs again, under a memory budget. Exact: it edits nothing itself.

On a copy of the graph every region becomes a loop (its bodies traced, not compiled); the calls of that copy are the
schedule that will run, and `mstc.plan.solve` picks the fastest options whose peak stays under the budget. The passes
that follow (`lm_head`, `mini_sequence`, `recompute`) read the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from mstc import compat
from mstc.errors import PlanError
from mstc.graph.copies import copy_of
from mstc.graph.costs import hint, is_seen
from mstc.graph.editor import Editor
from mstc.graph.sizes import size
from mstc.options import Budget
from mstc.passes.base import Chosen, Context, Pass, not_compiled, refuse
from mstc.passes.checkpoints import CHECKPOINTS
from mstc.passes.lm_head import LM_HEAD
from mstc.passes.loops import loop_key, savings_of
from mstc.passes.mini_sequence import MINI_SEQUENCE
from mstc.passes.offload import OFFLOAD
from mstc.passes.recompute import RECOMPUTE
from mstc.plan.around import lowered_around
from mstc.plan.borders import can_run_again
from mstc.plan.calls import Call, Saving, Step, read_step, with_savings
from mstc.plan.devices import Device, local
from mstc.plan.extras import extras_of
from mstc.plan.parted import Schedule, part, schedule_of
from mstc.plan.saves import Levels
from mstc.plan.solve import Solution, chosen_calls, least_peak, solve
from mstc.plan.stages import ALL_LEVERS, Extra, Levers, Stage, stages_of
from mstc.plan.words import bytes_text, in_words
from mstc.report import Fidelity, Refusal

MIB = 2**20
TRIES = 4
_LEVERS = {
    "chunks": "running in chunks",
    "recompute": "recomputing q/k/v",
    "attention": "recomputing attention",
    "offload": "offloading",
}


@dataclass(frozen=True)
class BudgetSite:
    """The plan, by the keys of the calls, and what is expected of it; lengths: dynamic ones, planned as captured."""

    chosen: dict[str, Chosen]
    lines: tuple[str, ...]
    lengths: tuple[torch.SymInt, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A graph as it would run: its calls, the keys of its loops by the names of these, what its stages hold besides."""

    step: Step
    keys: dict[str, str]
    dtype: str
    device: Device
    extras: tuple[Extra, ...]

    def stages(self, levers: Levers = ALL_LEVERS) -> list[Stage]:
        return stages_of(self.step, self.device, self.dtype, levers, self.extras)


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[BudgetSite | Refusal]:
    budget = ctx.options.memory_budget
    if budget is None or ctx.planning:
        return
    unknown = next((n for n in gm.graph.nodes if not all(map(is_seen, _shape(n)))), None)
    if unknown is not None:
        reason = "only a run tells how long it is, so no plan can tell its bytes"
        yield refuse("memory_budget", unknown, reason, "compute on all tokens and weigh those left out by zero")
        return
    found = _fitting(gm, ctx, draft_of(gm, ctx), budget)
    yield replace(found, lengths=_lengths(gm))


def apply(editor: Editor, site: BudgetSite, ctx: Context) -> None:
    ctx.chosen.update(site.chosen)
    ctx.plan.extend(site.lines)
    for length in site.lengths:
        compat.guard_at_most(length, hint(length))
        ctx.plan.append(f"planned for {length} up to {hint(length)}: a longer one is planned anew")


def _shape(node: fx.Node) -> Sequence[int | torch.SymInt]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()


def _lengths(gm: fx.GraphModule) -> tuple[torch.SymInt, ...]:
    """The dynamic lengths of the graph's inputs; a number that is the length of none costs no bytes."""
    sizes = [s for n in gm.graph.find_nodes(op="placeholder") for s in _shape(n) if isinstance(s, torch.SymInt)]
    return tuple({size(s): s for s in sizes}.values())


def draft_of(gm: fx.GraphModule, ctx: Context, device: Device | None = None) -> Draft:
    """The graph with every region as a loop, drafted on a copy."""
    trial = Context(ctx.options, ctx.training, compile_body=not_compiled, planning=True)
    savings: dict[str, list[Saving]] = {}
    levels: dict[str, Levels] = {}

    def see(one: Pass, sites: list[Any]) -> None:
        if one is MINI_SEQUENCE:
            savings.update({loop_key(s.region): savings_of(s, trial, levels) for s in sites})

    copied = _with_loops(gm, ctx, trial, see)
    values = [n.meta.get("val") for n in gm.graph.find_nodes(op="placeholder")]
    weights = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    widest = max(weights, key=lambda v: v.numel(), default=torch.empty(0))
    dtype = str(widest.dtype).removeprefix("torch.")
    device = device or local(widest.device.type)
    step = read_step(copied, ctx.training, kind=device.kind)
    # Loops of earlier passes (attention by chunks of queries) are as they are.
    step.calls = [c if c.name in trial.keys or c.program is None else _settled(c) for c in step.calls]
    step = with_savings(step, {name: savings.get(key, ()) for name, key in trial.keys.items()})
    schedule = _schedule(copied, ctx, device)
    return Draft(step, trial.keys, dtype, device, extras_of(step, schedule, device, dtype))


def _schedule(gm: fx.GraphModule, ctx: Context, device: Device) -> Schedule:
    """What a graph holds, node by node, run by what will lower it."""
    lower = lowered_around(gm, ctx.options) or ctx.options.lower
    return schedule_of(part(gm, ctx.training, lower), device.kind)


def _with_loops(
    gm: fx.GraphModule, ctx: Context, trial: Context, see: Callable[[Pass, list[Any]], None] = lambda one, sites: None
) -> fx.GraphModule:
    """A copy of the graph after the passes that follow this one; ``see`` hears of the sites of each before they go."""
    copied, twins = copy_of(gm)
    trial.facts = {name: {twins.get(n, n): v for n, v in known.items()} for name, known in ctx.facts.items()}
    editor = Editor(copied)
    for one in (LM_HEAD, MINI_SEQUENCE, CHECKPOINTS, RECOMPUTE, OFFLOAD):
        sites = [s for s in one.find(copied, trial) if not isinstance(s, Refusal)] if one.runs(ctx.options) else []
        see(one, sites)
        for site in sites:
            one.apply(editor, site, trial)
        if sites:
            editor.finish()
            trial.edited()
    return copied


def _settled(call: Call) -> Call:
    return replace(call, program=None, kind="queries")


def _fitting(gm: fx.GraphModule, ctx: Context, draft: Draft, budget: Budget) -> BudgetSite:
    """The fastest plan whose graph, parted as it will be, stays under the budget; `PlanError` says what would do.

    What the plan adds up and what the parted graph holds differ by little; where that is too much, the next plan
    leaves that difference free.
    """
    limit = budget.total - outside_of(budget, draft)
    levers = levers_of(ctx)
    stages, resident = draft.stages(levers), resident_of(draft.step)
    spare = 0
    for _ in range(TRIES):
        solution = solve(stages, resident, limit - spare)
        if solution is None:
            break
        site, peak = _checked(gm, ctx, draft, stages, solution, budget)
        if peak <= limit:
            return site
        spare = max(spare, peak - solution.peak)
    site, peak = _checked(gm, ctx, draft, stages, least_peak(stages, resident), budget)
    if peak <= limit:
        return site
    raise _too_small(draft, budget, levers, peak)


def _too_small(draft: Draft, budget: Budget, levers: Levers, peak: int) -> PlanError:
    """peak: of the smallest plan there is."""
    resident, outside = resident_of(draft.step), outside_of(budget, draft)
    least = peak + outside
    brings = [f"{words} brings {bytes_text(more)} of that" for words, more in _brought(draft, levers)]
    with_offload = replace(levers, offload=True)
    if not levers.offload and levers.recompute:
        less = least_peak(draft.stages(with_offload), resident).peak
        words = "options={'recompute': {'offload': True}} would do with"
        brings.append(f"{words} {bytes_text(less + outside)}")
    given, needed = bytes_text(budget.total), bytes_text(least)
    if given == needed:
        given, needed = f"{budget.total:,} bytes", f"{least:,}"
    return PlanError(
        f"option 'memory_budget' is {given}, but the smallest plan needs {needed} "
        f"(parameters and inputs {bytes_text(resident)}{'; ' if brings else ''}{', '.join(brings)}); "
        f"give at least {-(-least // MIB)} MiB, or a shorter sequence"
    )


def _brought(draft: Draft, levers: Levers) -> Iterator[tuple[str, int]]:
    """By how many bytes the least peak would be higher without one of the levers that may be used."""
    resident = resident_of(draft.step)
    least = least_peak(draft.stages(levers), resident).peak
    for lever, words in _LEVERS.items():
        if getattr(levers, lever):
            without = replace(levers, **{lever: False})
            more = least_peak(draft.stages(without), resident).peak - least
            if more > 0:
                yield words, more


def levers_of(ctx: Context) -> Levers:
    """What the options leave to the plan."""
    o = ctx.options
    free = not isinstance(o.mini_sequence.chunk_tokens, int) and not isinstance(o.lm_head.chunk_tokens, int)
    again = o.recompute.enabled
    return Levers(chunks=free, recompute=again, attention=again, offload=again and o.recompute.offload)


def resident_of(step: Step) -> int:
    return sum(step.sizes[m] for m in (*step.parameters, *step.inputs))


def outside_of(budget: Budget, draft: Draft) -> int:
    """Bytes that others hold: as given, or what the device's allocator counts beyond this graph's inputs."""
    if budget.outside != "auto":
        return budget.outside
    if not torch.cuda.is_available():
        return 0
    return max(torch.cuda.memory_allocated() - resident_of(draft.step), 0)


def chosen_step(draft: Draft, stages: list[Stage], solution: Solution) -> Step:
    """The calls as the solution runs them."""
    return replace(draft.step, calls=chosen_calls(stages, solution))


def _checked(
    gm: fx.GraphModule, ctx: Context, draft: Draft, stages: list[Stage], solution: Solution, budget: Budget
) -> tuple[BudgetSite, int]:
    """The plan, and the peak of its graph as the lowering will part it."""
    step = chosen_step(draft, stages, solution)
    chosen = {
        draft.keys.get(before.name, before.name): Chosen(
            after.chunks,
            after.again and can_run_again(before),
            tuple(after.makes.index(m) for m in after.offloads),
            after.saved,
        )
        for before, after in zip(draft.step.calls, step.calls, strict=True)
        if before.name in draft.keys or can_run_again(before) or after.offloads
    }
    trial = Context(ctx.options, ctx.training, compile_body=not_compiled, explained=True, chosen=chosen)
    peak = _schedule(_with_loops(gm, ctx, trial), ctx, draft.device).timeline.peak
    offloads = any(c.offload for c in chosen.values())
    ahead = max(solution.peak - peak.total, 0) if offloads and draft.device.overlaps else 0
    parts = ", ".join(f"{name} {size / MIB:.0f}" for name, size in peak.held.items() if size >= MIB) or "all below 1"
    lines = (
        f"memory budget {budget.total / MIB:.0f} MiB: predicted peak {(peak.total + ahead) / MIB:.4g} MiB ({parts}), "
        f"predicted step {solution.seconds:.3f} s on {draft.device.label}",
        *in_words(step.calls),
        *_offloaded_in_words(step),
    )
    return BudgetSite(chosen, lines), peak.total + ahead


def _offloaded_in_words(step: Step) -> list[str]:
    size = sum(step.sizes[m] for c in step.calls for m in c.offloads)
    return [f"{size / MIB:.0f} MiB wait for the backward elsewhere"] if size else []


MEMORY_BUDGET = Pass("memory_budget", "memory_budget", Fidelity.EXACT, find, apply)
