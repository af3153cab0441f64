"""Everything that ``mstc plan`` says about one model on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from mstc.cli.plan.building import eager_attention
from mstc.cli.plan.draft import Planned, plan_for
from mstc.cli.plan.models import Target
from mstc.cli.plan.peers import FLASH, SYSTEMS, Peer, readings_for, systems_for
from mstc.cli.plan.search import MOST, last_that_fits
from mstc.cli.plan.setting import Setting
from mstc.errors import PlanError
from mstc.plan.devices import Device
from mstc.plan.solve import Solution, chosen_calls
from mstc.plan.stages import Levers, Stage
from mstc.plan.words import bytes_text, in_words

AWAY = "mstc, offloading"
OFFLOADING = Levers(offload=True)
GRAIN = 256  # tokens to which the longest length of a peer is told
FEWEST = 1024  # tokens of the shortest that is told


@dataclass(frozen=True)
class Row:
    """One system: the longest sequence that fits, and peak and seconds at ``tokens`` (None where that does not fit).

    in_blocks: the longest where the allocator cannot grow its segments (None where the schedule is not known so well).
    """

    system: str
    longest: int
    tokens: int
    peak: int | None
    seconds: float | None
    in_blocks: int | None = None


@dataclass
class Answer:
    """The table of systems, mstc's plan at ``tokens``, and what was assumed.

    plan_offloading, host: the plan where values may be offloaded (at its own longest length unless one was given),
    and the bytes that lie on the host then.
    """

    model: str
    device: Device
    batch: int
    tokens: int
    planned: Planned
    rows: list[Row] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)
    plan: list[str] = field(default_factory=list)
    plan_offloading: list[str] = field(default_factory=list)
    host: int = 0
    what_if: list[dict[str, Any]] = field(default_factory=list)
    assumptions: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "device": asdict(self.device),
            "batch": self.batch,
            "tokens": self.tokens,
            "systems": [asdict(r) for r in self.rows],
            "peak_by_category": self.held,
            "plan": self.plan,
            "plan_offloading": self.plan_offloading,
            "host_bytes": self.host,
            "what_if": self.what_if,
            "assumptions": self.assumptions,
        }


def steps_of(target: Target) -> int:
    """How often `answer` tells what it is about to do."""
    return 3 + len(systems_for(target))


def answer(
    target: Target, setting: Setting, seq: int | None, tell: Callable[[str], None] = lambda doing: None
) -> Answer:
    """Plan the target; ``tell`` hears what comes next. Raises `PlanError` where not even the shortest sequence fits,
    and where the model has fewer positions than ``seq``.

    seq: tokens per sequence; None: each system's own longest.
    """
    if seq and target.positions and seq > target.positions:
        raise PlanError(
            f"{target.name} has learned positions for {target.positions} tokens, but --seq is {seq}; give a shorter "
            "one, or a configuration of more positions"
        )
    tell(f"capturing {target.name}")
    planned = plan_for(target, setting)
    tell("mstc's longest sequence")
    budget = setting.device.usable()
    longest = planned.longest(budget)
    if not longest:
        raise _does_not_fit(target, planned, setting.device)
    found = Answer(target.name, setting.device, setting.batch, seq or longest, planned)
    farthest = planned.longest(budget, OFFLOADING)
    for name in systems_for(target):
        tell(SYSTEMS[name])
        found.rows.append(_peer(name, target, setting, seq))
    _as_planned(found, longest, budget)
    _offloading(found, farthest, seq or farthest, budget)
    tell("other budgets")
    stages = planned.stages(found.tokens)
    found.what_if = [
        {"peak": s.peak, "seconds": s.seconds, "plan": in_words(chosen_calls(stages, s))}
        for s in planned.frontier(found.tokens)
    ]
    found.assumptions = _assumptions(target, setting)
    return found


def _does_not_fit(target: Target, planned: Planned, device: Device) -> PlanError:
    need = max(planned.least(FEWEST).peak, planned.stepped)
    return PlanError(
        f"{target.name} does not fit on {device.label}: {FEWEST} tokens need {bytes_text(need)} of "
        f"{bytes_text(device.usable())}; take a larger device or an optimizer that holds less"
    )


def _as_planned(found: Answer, longest: int, budget: int) -> None:
    """The row of mstc, and its plan where ``tokens`` fit."""
    solution = found.planned.fastest(found.tokens, budget)
    if solution is None:
        found.rows.append(Row("mstc", longest, found.tokens, None, None))
        return
    found.rows.append(Row("mstc", longest, found.tokens, solution.peak, solution.seconds))
    stages = found.planned.stages(found.tokens)
    found.held = _categories(found.planned, stages, solution)
    found.plan = in_words(chosen_calls(stages, solution))


def _offloading(found: Answer, longest: int, tokens: int, budget: int) -> None:
    """The row of mstc where it may offload, and its plan."""
    solution = found.planned.fastest(tokens, budget, OFFLOADING)
    if solution is None:
        found.rows.append(Row(AWAY, longest, tokens, None, None))
        return
    found.rows.append(Row(AWAY, longest, tokens, solution.peak, solution.seconds))
    found.plan_offloading = in_words(chosen_calls(found.planned.stages(tokens, OFFLOADING), solution))
    found.host = sum(o.offloaded for o in solution.options)


def _peer(system: str, target: Target, setting: Setting, seq: int | None) -> Row:
    peer, budget = Peer(system, target.config, setting), setting.device.usable()
    schedule = peer.schedule(*readings_for(target))
    longest = min(longest_of(schedule.peak, budget), target.positions or MOST)
    in_blocks = longest_in_blocks(lambda n: schedule.fits_in_blocks(n, budget), longest)
    tokens = seq or longest
    usage = peer.usage(tokens) if tokens else None
    if usage is None or usage.peak > budget:
        return Row(SYSTEMS[system], longest, tokens, None, None, in_blocks)
    return Row(SYSTEMS[system], longest, tokens, usage.peak, usage.seconds, in_blocks)


def longest_of(peak: Callable[[int], int], budget: int) -> int:
    """The most tokens, in steps of `GRAIN`, whose ``peak`` (which grows with them) stays within the budget; 0 where
    `FEWEST` exceed it."""
    longest = last_that_fits(lambda tokens: peak(tokens) - budget, GRAIN)
    return longest if longest >= FEWEST else 0


def longest_in_blocks(fits: Callable[[int], bool], longest: int) -> int:
    """The first length that has room in blocks, from ``longest`` down by a sixty-fourth of it (at least `GRAIN`): what
    lies between is in no order, since a longer sequence may happen to fit where a shorter one does not."""
    step = max(longest // 64 // GRAIN, 1) * GRAIN
    return next((tokens for tokens in range(longest, 0, -step) if fits(tokens)), 0)


def _categories(planned: Planned, stages: list[Stage], solution: Solution) -> dict[str, int]:
    """The peak of the plan by category."""
    gradients = sum(s.gradients for s in stages)
    saved = best = 0
    held = {}
    for stage, option in zip(stages, solution.options, strict=True):
        gradients -= stage.gradients
        beside = stage.passing
        for now, after in ((option.forward + beside[0], 0), (option.backward + beside[1], gradients)):
            if saved + now + after > best:
                best = saved + now + after
                kept = saved + option.saved
                held = {"gradients": after, "saved": kept, "this layer": now - option.saved}
        saved += option.saved
    return {"parameters": planned.parameters, "optimizer state": planned.state, **held}


def _assumptions(target: Target, setting: Setting) -> list[str]:
    device = setting.device
    kinds = "as FUNCTION makes them" if target.of_user else f"in {setting.precision}, batch {setting.batch}"
    return [
        f"parameters, gradients and activations {kinds}",
        f"optimizer: {setting.optimizer.about}",
        f"memory: {device.usable() / 2**30:.2f} GiB = {device.memory / 2**30:.2f} GiB less "
        f"{device.context / 2**20:.0f} MiB for the driver",
        "longest: no fragmentation (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True); in blocks: with the defaults of "
        "PyTorch's allocator, of the eager systems",
        f"time: {device.reached:.0%} of peak in large products, {device.copies:.0%} of bandwidth, "
        f"{device.launch * 1e6:.0f} us per kernel ({'calibrated' if device.name == 'cpu' else 'assumed'})",
        *_of_systems(target),
        "mstc: gradients are held to the end of the backward under every optimizer",
        f"mstc, offloading: activations only, over a link of {device.link / 1e9:.0f} GB/s each way beside computation, "
        "into as much host memory as needed; parameters, gradients and optimizer state stay",
        *_of_positions(target),
        *(f"{what}: {source}" for what, source in device.sources.items()),
    ]


def _of_systems(target: Target) -> list[str]:
    if target.config is None:
        return []
    systems = systems_for(target)
    if not systems:
        return ["other systems: not shown, since nothing can stand in for FlashAttention in this model's code"]
    written = eager_attention(target.config, FLASH) != FLASH
    attention = "attention written out as the model has it" if written else "FlashAttention-2"
    if "mini-sequence" not in systems:
        return [f"plain, checkpointing: eager PyTorch, {attention}, the model's own loss"]
    return [
        f"plain, checkpointing, Mini-Sequence: eager PyTorch, {attention}, float32 logits with a shifted copy, "
        "as in transformers 4.4x; MLP in 8 pieces, head in 16 (its logits computed again), as in its published code"
    ]


def _of_positions(target: Target) -> list[str]:
    return [f"no sequence is longer than its {target.positions} learned positions"] if target.positions else []
