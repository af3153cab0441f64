"""The fastest choice of options under a budget, exactly, by a dynamic program over the stages.

    minimize  sum_i seconds_i   subject to, for every stage i,
    resident + sum_{j<i} saved_j + forward_i <= budget,
    resident + sum_{j<i} saved_j + sum_{j>i} gradients_j + backward_i <= budget.

Going forward, all that matters of the stages so far is (bytes saved, seconds), and of two such states one that is
no better in either is dropped. Both constraints only tighten as bytes are saved, so this loses no solution. A smaller
budget admits fewer solutions: it never gets a shorter time. Among the fastest plans the one of least peak is taken, so
it never gets a higher peak either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mstc.plan.stages import Option, Stage


@dataclass(frozen=True)
class Solution:
    """An option for each stage, the peak and the seconds that they add up to."""

    options: tuple[Option, ...]
    peak: int
    seconds: float


def solve(stages: Sequence[Stage], resident: int, budget: int | None = None) -> Solution | None:
    """The fastest plan under ``budget`` (None: any), of least peak among those; None where there is none."""
    best = _fastest(stages, resident, budget)
    while best is not None:
        lower = _fastest(stages, resident, best.peak - 1)
        if lower is None or lower.seconds > best.seconds * (1 + 1e-9):
            return best
        best = lower
    return None


def least_peak(stages: Sequence[Stage], resident: int) -> Solution:
    """The plan of least peak, whatever it costs, and the fastest of those."""
    best = _fastest(stages, resident, None)
    assert best is not None
    low, high = resident, best.peak
    while high - low > max(high // 2000, 1):
        middle = (low + high) // 2
        found = _fastest(stages, resident, middle)
        if found is None:
            low = middle
        else:
            best, high = found, found.peak
    return best


def frontier(stages: Sequence[Stage], resident: int, most: int = 12) -> list[Solution]:
    """Plans from the fastest to the smallest, at budgets evenly spread between them."""
    fastest = solve(stages, resident)
    assert fastest is not None
    smallest = least_peak(stages, resident)
    found = [fastest]
    for i in range(1, most):
        budget = fastest.peak - (fastest.peak - smallest.peak) * i // (most - 1)
        plan = solve(stages, resident, max(budget, smallest.peak))
        if plan is not None and plan.peak < found[-1].peak:
            found.append(plan)
    return found


def _fastest(stages: Sequence[Stage], resident: int, budget: int | None) -> Solution | None:
    after = _gradients_after(stages)
    saved = torch.zeros(1, dtype=torch.int64)
    spent = torch.zeros(1, dtype=torch.float64)
    trail: list[tuple[torch.Tensor, torch.Tensor]] = []
    for stage, gradients in zip(stages, after, strict=True):
        states = [_extend(o, saved, spent, resident, gradients, budget) for o in stage.options]
        saved, spent, parents, chosen = _prune(states)
        if not saved.numel():
            return None
        trail.append((parents, chosen))
    at = int(spent.argmin())
    picked: list[Option] = []
    for stage, (parents, chosen) in zip(reversed(stages), reversed(trail), strict=True):
        picked.append(stage.options[int(chosen[at])])
        at = int(parents[at])
    options = tuple(reversed(picked))
    return Solution(options, peak_of(stages, options, resident), sum(o.seconds for o in options))


def peak_of(stages: Sequence[Stage], options: Sequence[Option], resident: int) -> int:
    """The peak of one option per stage."""
    peak, saved = resident, 0
    for option, gradients in zip(options, _gradients_after(stages), strict=True):
        peak = max(peak, resident + saved + option.forward, resident + saved + gradients + option.backward)
        saved += option.saved
    return peak


def _gradients_after(stages: Sequence[Stage]) -> list[int]:
    total, after = 0, []
    for stage in reversed(stages):
        after.append(total)
        total += stage.gradients
    return after[::-1]


def _extend(
    option: Option, saved: torch.Tensor, spent: torch.Tensor, resident: int, gradients: int, budget: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(bytes saved, seconds, position of the state before) of every state to which the option may be added."""
    most = max(option.forward, gradients + option.backward)
    fits = torch.arange(saved.numel()) if budget is None else (saved + (resident + most) <= budget).nonzero().flatten()
    return saved[fits] + option.saved, spent[fits] + option.seconds, fits


def _prune(
    states: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The states that no other beats in bytes and seconds."""
    saved, spent, parents = (torch.cat([s[i] for s in states]) for i in range(3))
    chosen = torch.cat([torch.full_like(s[2], i) for i, s in enumerate(states)])
    order = torch.argsort(spent, stable=True)
    order = order[torch.argsort(saved[order], stable=True)]
    saved, spent, parents, chosen = saved[order], spent[order], parents[order], chosen[order]
    if saved.numel():
        before = torch.cat([torch.full((1,), float("inf"), dtype=spent.dtype), spent.cummin(0).values[:-1]])
        keep = spent < before * (1 - 1e-12)
        saved, spent, parents, chosen = saved[keep], spent[keep], parents[keep], chosen[keep]
    return saved, spent, parents, chosen
