"""The fastest choice of options under a budget, exactly, by a dynamic program over the stages.

    minimize  sum_i seconds_i   subject to, for every stage i,
    resident + sum_{j<i} saved_j + carry_{i-1} + passing_i + forward_i <= budget,
    resident + sum_{j<i} saved_j + carry_{i-1} + passing_i + sum_{j>i} gradients_j + backward_i <= budget,

with carry_{i-1} what the stage before offloads and this one holds again, and passing_i what others hand to each other
over it. Going forward, all that matters of the stages
so far is (bytes saved, seconds) and the last one's carry; of two such states with the same carry, one that is no
better in either is dropped. Both constraints only tighten as bytes are saved, so this loses no solution. A smaller
budget admits fewer solutions: it never gets a shorter time. Among the fastest plans the one of least peak is taken, so
it never gets a higher peak either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from mstc.plan.calls import Call
from mstc.plan.stages import Option, Stage, apply_choice


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


def chosen_calls(stages: Sequence[Stage], solution: Solution) -> list[Call]:
    """The calls of all stages as the solution runs them."""
    return [c for s, o in zip(stages, solution.options, strict=True) for c in apply_choice(s.calls, o.choice)]


def _fastest(stages: Sequence[Stage], resident: int, budget: int | None) -> Solution | None:
    states = _States.start()
    trail: list[_States] = []
    for stage, beside in zip(stages, _beside(stages), strict=True):
        made: dict[tuple[int, int], list[_States]] = {}
        for i, option in enumerate(stage.options):
            made.setdefault(option.carry, []).append(_extend(i, option, states, resident, beside, budget))
        states = _States.joined([_States.joined(alike).pruned() for alike in made.values()])
        if not states.saved.numel():
            return None
        trail.append(states)
    at = int(states.spent.argmin())
    picked: list[Option] = []
    for stage, ended in zip(reversed(stages), reversed(trail), strict=True):
        picked.append(stage.options[int(ended.chosen[at])])
        at = int(ended.parents[at])
    options = tuple(reversed(picked))
    return Solution(options, peak_of(stages, options, resident), sum(o.seconds for o in options))


def peak_of(stages: Sequence[Stage], options: Sequence[Option], resident: int) -> int:
    """The peak of one option per stage."""
    peak, saved, carry = resident, 0, (0, 0)
    for option, (forward, backward) in zip(options, _beside(stages), strict=True):
        held = max(carry[0] + forward + option.forward, carry[1] + backward + option.backward)
        peak = max(peak, resident + saved + held)
        saved += option.saved
        carry = option.carry
    return peak


def _beside(stages: Sequence[Stage]) -> list[tuple[int, int]]:
    """Bytes that lie beside each stage in its forward and backward, whatever is chosen."""
    total, found = 0, []
    for stage in reversed(stages):
        found.append((stage.passing[0], stage.passing[1] + total))
        total += stage.gradients
    return found[::-1]


@dataclass(frozen=True)
class _States:
    """Ways to run the stages so far, each a position in tensors of the same length.

    saved: bytes; spent: seconds; carry, carry_back: what the next stage holds of the last one in its forward and
    backward; parents: the state before; chosen: the last stage's option.
    """

    saved: torch.Tensor
    spent: torch.Tensor
    carry: torch.Tensor
    carry_back: torch.Tensor
    parents: torch.Tensor
    chosen: torch.Tensor

    @staticmethod
    def start() -> _States:
        zero = torch.zeros(1, dtype=torch.int64)
        return _States(zero, zero.double(), zero, zero, zero, zero)

    @staticmethod
    def joined(several: Sequence[_States]) -> _States:
        return _States(*(torch.cat([getattr(s, f.name) for s in several]) for f in fields(_States)))

    def at(self, which: torch.Tensor) -> _States:
        return _States(*(getattr(self, f.name)[which] for f in fields(_States)))

    def pruned(self) -> _States:
        """Those that no other beats in bytes and seconds."""
        order = torch.argsort(self.spent, stable=True)
        order = order[torch.argsort(self.saved[order], stable=True)]
        found = self.at(order)
        if not found.saved.numel():
            return found
        first = torch.full((1,), float("inf"), dtype=found.spent.dtype)
        before = torch.cat([first, found.spent.cummin(0).values[:-1]])
        return found.at(found.spent < before * (1 - 1e-12))


def _extend(
    number: int, option: Option, states: _States, resident: int, beside: tuple[int, int], budget: int | None
) -> _States:
    """Every state to which the option may be added, with it."""
    forward, backward = beside
    held = torch.maximum(states.carry + (forward + option.forward), states.carry_back + (backward + option.backward))
    if budget is None:
        fits = torch.arange(held.numel())
    else:
        fits = (states.saved + held + resident <= budget).nonzero().flatten()
    like = torch.ones_like(fits)
    carry, back = option.carry
    return _States(
        states.saved[fits] + option.saved,
        states.spent[fits] + option.seconds,
        carry * like,
        back * like,
        fits,
        number * like,
    )
