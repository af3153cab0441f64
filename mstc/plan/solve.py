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
    program = _Program.of(stages, resident)
    best = program.fastest(budget)
    while best is not None:
        lower = program.fastest(best.peak - 1)
        if lower is None or lower.seconds > best.seconds * (1 + 1e-9):
            return best
        best = lower
    return None


def fits(stages: Sequence[Stage], resident: int, budget: int) -> bool:
    """Whether any plan stays under ``budget``."""
    return _Program.of(stages, resident, timed=False).fastest(budget) is not None


def least_bytes(stages: Sequence[Stage], resident: int) -> int:
    """The smallest budget, to a two-thousandth of it, under which there is a plan."""
    without_time = _Program.of(stages, resident, timed=False)
    low, high = resident, peak_of(stages, [min(s.options, key=lambda o: o.saved) for s in stages], resident)
    while high - low > max(high // 2000, 1):
        middle = (low + high) // 2
        if without_time.fastest(middle) is None:
            low = middle
        else:
            high = middle
    return high


def least_peak(stages: Sequence[Stage], resident: int) -> Solution:
    """The plan of least peak, to a two-thousandth of it, and the fastest of those."""
    best = _Program.of(stages, resident).fastest(least_bytes(stages, resident))
    assert best is not None
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
class _Table:
    """The options of a stage, each a position in tensors of the same length; alike: those of the same carry."""

    saved: torch.Tensor
    spent: torch.Tensor
    forward: torch.Tensor
    backward: torch.Tensor
    alike: dict[tuple[int, int], torch.Tensor]

    @staticmethod
    def of(stage: Stage, timed: bool) -> _Table:
        options = stage.options
        alike: dict[tuple[int, int], list[int]] = {}
        for i, option in enumerate(options):
            alike.setdefault(option.carry, []).append(i)
        return _Table(
            torch.tensor([o.saved for o in options]),
            torch.tensor([o.seconds if timed else 0.0 for o in options], dtype=torch.float64),
            torch.tensor([o.forward for o in options]),
            torch.tensor([o.backward for o in options]),
            {carry: torch.tensor(which) for carry, which in alike.items()},
        )


@dataclass(frozen=True)
class _Program:
    """Stages, each with its table (identical stages share one) and the bytes that lie beside it."""

    stages: Sequence[Stage]
    tables: Sequence[_Table]
    beside: Sequence[tuple[int, int]]
    resident: int

    @staticmethod
    def of(stages: Sequence[Stage], resident: int, timed: bool = True) -> _Program:
        """timed: whether seconds count; without them a state for each carry is all that remains, which tells fast what
        fits."""
        tables = {key: _Table.of(s, timed) for key, s in {id(s.options): s for s in stages}.items()}
        return _Program(stages, [tables[id(s.options)] for s in stages], _beside(stages), resident)

    def fastest(self, budget: int | None) -> Solution | None:
        """A fastest plan under ``budget``; None where there is none."""
        states = _States.start()
        trail: list[_States] = []
        room = None if budget is None else budget - self.resident
        for table, beside in zip(self.tables, self.beside, strict=True):
            states = _extended(states, table, beside, room)
            if not states.saved.numel():
                return None
            trail.append(states)
        at = int(states.spent.argmin())
        picked: list[Option] = []
        for stage, ended in zip(reversed(self.stages), reversed(trail), strict=True):
            picked.append(stage.options[int(ended.chosen[at])])
            at = int(ended.parents[at])
        options = tuple(reversed(picked))
        return Solution(options, peak_of(self.stages, options, self.resident), sum(o.seconds for o in options))


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


def _extended(states: _States, table: _Table, beside: tuple[int, int], room: int | None) -> _States:
    """Every state with every option that fits into ``room``; of those that the next stage sees alike, only the ones
    that no other beats in bytes and seconds."""
    return _States.joined([_with_options(states, table, beside, room, *alike) for alike in table.alike.items()])


def _with_options(
    states: _States,
    table: _Table,
    beside: tuple[int, int],
    room: int | None,
    carry: tuple[int, int],
    which: torch.Tensor,
) -> _States:
    forward, backward = beside
    held = torch.maximum(
        states.carry + (table.forward[which] + forward)[:, None],
        states.carry_back + (table.backward[which] + backward)[:, None],
    )
    fits = torch.ones_like(held, dtype=torch.bool) if room is None else states.saved + held <= room
    rows, parents = fits.nonzero(as_tuple=True)
    chosen = which[rows]
    saved, spent = states.saved[parents] + table.saved[chosen], states.spent[parents] + table.spent[chosen]
    best = _unbeaten(saved, spent)
    first, back = (torch.full_like(best, c) for c in carry)
    return _States(saved[best], spent[best], first, back, parents[best], chosen[best])


def _unbeaten(saved: torch.Tensor, spent: torch.Tensor) -> torch.Tensor:
    """The positions that no other beats in bytes and seconds, by bytes."""
    if not saved.numel():
        return torch.zeros(0, dtype=torch.int64)
    order = torch.argsort(spent, stable=True)
    order = order[torch.argsort(saved[order], stable=True)]
    before = spent[order].cummin(0).values.roll(1)
    before[0] = float("inf")
    return order[spent[order] < before * (1 - 1e-12)]
