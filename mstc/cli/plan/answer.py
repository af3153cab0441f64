"""Everything that ``mstc plan`` says about one model on one device."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from mstc.cli.plan.draft import Planned, plan_for
from mstc.cli.plan.models import Target
from mstc.cli.plan.optimizers import Optimizer
from mstc.cli.plan.peers import SYSTEMS, Peer
from mstc.errors import PlanError
from mstc.plan.devices import Device
from mstc.plan.solve import Solution
from mstc.plan.stages import Levers, Stage, can_run_again

AWAY = "mstc, offloading"
OFFLOADING = Levers(offload=True)
GRAIN = 256  # tokens to which the longest length of a peer is told


@dataclass(frozen=True)
class Row:
    """One system: the longest sequence that fits, and peak and seconds at ``tokens`` (None where that does not fit)."""

    system: str
    longest: int
    tokens: int
    peak: int | None
    seconds: float | None


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


def answer(
    target: Target, device: Device, seq: int | None, batch: int, dtype: torch.dtype, optimizer: Optimizer
) -> Answer:
    """Plan the target. Raises `PlanError` where not even the shortest sequence fits."""
    planned = plan_for(target, batch, dtype, optimizer, device)
    budget = device.usable()
    longest = planned.longest(budget)
    if not longest:
        need = max(planned.least(1024).peak, planned.resident + planned.gradients + planned.stepping)
        raise PlanError(
            f"{target.name} does not fit on {device.label}: 1024 tokens need {need / 2**30:.1f} GiB of "
            f"{budget / 2**30:.1f} GiB; take a larger device or an optimizer that holds less"
        )
    tokens = seq or longest
    farthest = planned.longest(budget, OFFLOADING)
    solution = planned.fastest(tokens, budget)
    found = Answer(target.name, device, batch, tokens, planned)
    if target.config is not None:
        found.rows += [_peer(name, target, device, seq, batch, dtype, optimizer) for name in SYSTEMS]
    if solution is None:
        found.rows.append(Row("mstc", longest, tokens, None, None))
    else:
        found.rows.append(Row("mstc", longest, tokens, solution.peak, solution.seconds))
        stages = planned.stages(tokens)
        found.held = _categories(planned, stages, solution)
        found.plan = in_words(stages, solution)
    _offloading(found, farthest, seq or farthest, budget)
    found.what_if = [
        {"peak": s.peak, "seconds": s.seconds, "plan": "; ".join(in_words(planned.stages(tokens), s))}
        for s in planned.frontier(tokens)
    ]
    found.assumptions = _assumptions(device, dtype, batch, optimizer)
    return found


def _offloading(found: Answer, longest: int, tokens: int, budget: int) -> None:
    """The row of mstc where it may offload, and its plan."""
    solution = found.planned.fastest(tokens, budget, OFFLOADING)
    if solution is None:
        found.rows.append(Row(AWAY, longest, tokens, None, None))
        return
    found.rows.append(Row(AWAY, longest, tokens, solution.peak, solution.seconds))
    found.plan_offloading = in_words(found.planned.stages(tokens, OFFLOADING), solution)
    found.host = sum(o.offloaded for o in solution.options)


def _peer(
    system: str, target: Target, device: Device, seq: int | None, batch: int, dtype: torch.dtype, optimizer: Optimizer
) -> Row:
    peer = Peer(system, target.config, dtype, optimizer, device)
    longest = _longest(peer, batch, device.usable())
    tokens = seq or longest
    usage = peer.usage(batch, tokens) if tokens else None
    fits = usage is not None and usage.peak <= device.usable()
    assert usage is None or usage.peak > 0
    return Row(
        SYSTEMS[system],
        longest,
        tokens,
        usage.peak if fits and usage else None,
        usage.seconds if fits and usage else None,
    )


def _longest(peer: Peer, batch: int, budget: int) -> int:
    """By the secant: the peak is affine in the tokens, piece by piece."""
    low, high = 1024, 8192
    at = {n: peer.usage(batch, n).peak for n in (low, high)}
    if at[low] > budget:
        return 0
    for _ in range(4):
        guess = int(low + (high - low) * (budget - at[low]) / max(at[high] - at[low], 1))
        guess = max(guess // GRAIN * GRAIN, GRAIN)
        if guess in at:
            break
        at[guess] = peer.usage(batch, guess).peak
        fitting = [n for n in at if at[n] <= budget]
        above = [n for n in at if at[n] > budget]
        low = max(fitting)
        high = min(above) if above else max(n for n in at if n != low)
    return max(n for n in at if at[n] <= budget)


def in_words(stages: list[Stage], solution: Solution) -> list[str]:
    """How many stages run which way."""
    counted: dict[str, int] = {}
    for stage, option in zip(stages, solution.options, strict=True):
        again = iter(option.choice.again)
        repeated = [c.label for c in stage.calls if can_run_again(c) and next(again)]
        words = f"chunks {'/'.join(map(str, option.choice.counts))}"
        words += f", again: {' + '.join(dict.fromkeys(repeated))}" if repeated else ""
        loops = [c for c in stage.calls if c.program is not None]
        inside = dict.fromkeys(c.label for c, level in zip(loops, option.choice.saves, strict=True) if level)
        words += f", values saved inside: {' + '.join(inside)}" if inside else ""
        away = dict.fromkeys(stage.calls[i].label for i, _ in option.choice.offload)
        words += f", offloaded: {' + '.join(away)}" if away else ""
        counted[words] = counted.get(words, 0) + 1
    return [f"{n} x ({words})" for words, n in counted.items()]


def _categories(planned: Planned, stages: list[Stage], solution: Solution) -> dict[str, int]:
    """The peak of the plan by category."""
    gradients = sum(s.gradients for s in stages)
    saved = best = 0
    held = {}
    for stage, option in zip(stages, solution.options, strict=True):
        gradients -= stage.gradients
        for now, after in ((option.forward, 0), (option.backward, gradients)):
            if saved + now + after > best:
                best = saved + now + after
                kept = saved + option.saved
                held = {"gradients": after, "saved": kept, "this layer": now - option.saved}
        saved += option.saved
    return {"parameters": planned.parameters, "optimizer state": planned.state, **held}


def _assumptions(device: Device, dtype: torch.dtype, batch: int, optimizer: Optimizer) -> list[str]:
    return [
        f"parameters, gradients and activations in {str(dtype).removeprefix('torch.')}, batch {batch}",
        f"optimizer: {optimizer.about}",
        f"memory: {device.usable() / 2**30:.2f} GiB = {device.memory / 2**30:.2f} GiB less "
        f"{device.context / 2**20:.0f} MiB for the driver; no fragmentation",
        f"time: {device.reached:.0%} of peak in large products, {device.copies:.0%} of bandwidth, "
        f"{device.launch * 1e6:.0f} us per kernel ({'calibrated' if device.name == 'cpu' else 'assumed'})",
        "plain, checkpointing, Mini-Sequence: eager PyTorch, FlashAttention-2, float32 logits with a shifted copy, "
        "as in transformers 4.4x; MLP in 8 pieces, head in 16, as in its published code",
        "mstc: gradients are held to the end of the backward under every optimizer",
        f"mstc, offloading: activations only, over a link of {device.link / 1e9:.0f} GB/s each way beside computation, "
        "into as much host memory as needed; parameters, gradients and optimizer state stay",
        *(f"{what}: {source}" for what, source in device.sources.items()),
    ]
