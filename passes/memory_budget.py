"""One choice of chunks, of what is kept and of what runs again, under a memory budget. Exact: it edits nothing itself.

On a copy of the graph every region becomes a loop (its bodies traced, not compiled); the calls of that copy are the
schedule that will run, and `mstc.plan.solve` picks the fastest options whose peak stays under the budget. The passes
that follow (`lm_head`, `mini_sequence`, `recompute`) read the choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
from mstc.passes.recompute import RECOMPUTE
from mstc.plan.borders import can_run_again
from mstc.plan.calls import Call, Saving, Step, read_step, with_savings
from mstc.plan.devices import Device, local
from mstc.plan.memory import simulate
from mstc.plan.saves import Levels
from mstc.plan.solve import Solution, chosen_calls, least_peak, solve
from mstc.plan.stages import Levers, Stage, stages_of
from mstc.plan.words import bytes_text, in_words
from mstc.report import Fidelity, Refusal

MIB = 2**20
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
    """A graph as it would run: its calls, and the keys of its loops by the names of these."""

    step: Step
    keys: dict[str, str]
    dtype: str
    device: Device


def find(gm: fx.GraphModule, ctx: Context) -> Iterator[BudgetSite | Refusal]:
    budget = ctx.options.memory_budget
    if budget is None or ctx.planning:
        return
    unknown = next((n for n in gm.graph.nodes if not all(map(is_seen, _shape(n)))), None)
    if unknown is not None:
        reason = "only a run tells how long it is, so no plan can tell its bytes"
        yield refuse("memory_budget", unknown, reason, "compute on all tokens and weigh those left out by zero")
        return
    draft = draft_of(gm, ctx)
    stages = stages_of(draft.step, draft.device, draft.dtype, levers_of(ctx))
    site = _site(draft, stages, within(draft, stages, budget, levers_of(ctx)), budget)
    yield replace(site, lengths=_lengths(gm))


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
    copied, twins = copy_of(gm)
    trial = Context(ctx.options, ctx.training, compile_body=not_compiled, planning=True)
    trial.facts = {name: {twins.get(n, n): v for n, v in known.items()} for name, known in ctx.facts.items()}
    editor = Editor(copied)
    savings: dict[str, list[Saving]] = {}
    levels: dict[str, Levels] = {}
    for one in (LM_HEAD, MINI_SEQUENCE, CHECKPOINTS, RECOMPUTE):
        sites = [s for s in one.find(copied, trial) if not isinstance(s, Refusal)] if one.runs(ctx.options) else []
        savings |= {loop_key(s.region): savings_of(s, trial, levels) for s in sites if one is MINI_SEQUENCE}
        for site in sites:
            one.apply(editor, site, trial)
        if sites:
            editor.finish()
            trial.edited()
    values = [n.meta.get("val") for n in gm.graph.find_nodes(op="placeholder")]
    weights = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    widest = max(weights, key=lambda v: v.numel(), default=torch.empty(0))
    dtype = str(widest.dtype).removeprefix("torch.")
    device = device or local(widest.device.type)
    step = read_step(copied, ctx.training, kind=device.kind)
    # Loops of earlier passes (attention by chunks of queries) are as they are.
    step.calls = [c if c.name in trial.keys or c.program is None else _settled(c) for c in step.calls]
    step = with_savings(step, {name: savings.get(key, ()) for name, key in trial.keys.items()})
    return Draft(step, trial.keys, dtype, device)


def _settled(call: Call) -> Call:
    return replace(call, program=None, kind="op")


def within(draft: Draft, stages: list[Stage], budget: Budget, levers: Levers) -> Solution:
    """The fastest plan under the budget; `PlanError` where there is none says what would do."""
    resident = resident_of(draft.step)
    found = solve(stages, resident, budget.total - outside_of(budget, draft))
    if found is not None:
        return found
    least = least_peak(stages, resident).peak + outside_of(budget, draft)
    brings = [f"{words} brings {bytes_text(more)} of that" for words, more in _brought(draft, levers)]
    with_offload = replace(levers, offload=True)
    if not levers.offload and levers.recompute:
        less = least_peak(stages_of(draft.step, draft.device, draft.dtype, with_offload), resident).peak
        words = "options={'recompute': {'offload': True}} would do with"
        brings.append(f"{words} {bytes_text(less + outside_of(budget, draft))}")
    raise PlanError(
        f"option 'memory_budget' is {bytes_text(budget.total)}, but the smallest plan needs {bytes_text(least)} "
        f"(parameters and inputs {bytes_text(resident)}{'; ' if brings else ''}{', '.join(brings)}); "
        f"give at least {-(-least // MIB)} MiB, or a shorter sequence"
    )


def _brought(draft: Draft, levers: Levers) -> Iterator[tuple[str, int]]:
    """By how many bytes the least peak would be higher without one of the levers that may be used."""
    resident = resident_of(draft.step)
    least = least_peak(stages_of(draft.step, draft.device, draft.dtype, levers), resident).peak
    for lever, words in _LEVERS.items():
        if getattr(levers, lever):
            without = replace(levers, **{lever: False})
            more = least_peak(stages_of(draft.step, draft.device, draft.dtype, without), resident).peak - least
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


def _site(draft: Draft, stages: list[Stage], solution: Solution, budget: Budget) -> BudgetSite:
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
    peak = simulate(step).peak
    offloads = any(c.offload for c in chosen.values())
    ahead = max(solution.peak - peak.total, 0) if offloads and draft.device.overlaps else 0
    parts = ", ".join(f"{name} {size / MIB:.0f}" for name, size in peak.held.items() if size >= MIB) or "all below 1"
    lines = (
        f"memory budget {budget.total / MIB:.0f} MiB: predicted peak {(peak.total + ahead) / MIB:.0f} MiB ({parts}), "
        f"predicted step {solution.seconds:.3f} s on {draft.device.label}",
        *in_words(step.calls),
        *_offloaded_in_words(step),
    )
    return BudgetSite(chosen, lines)


def _offloaded_in_words(step: Step) -> list[str]:
    size = sum(step.sizes[m] for c in step.calls for m in c.offloads)
    return [f"{size / MIB:.0f} MiB wait for the backward elsewhere"] if size else []


MEMORY_BUDGET = Pass("memory_budget", "memory_budget", Fidelity.EXACT, find, apply)
