"""The dynamic program against trying every combination."""

from __future__ import annotations

import itertools
import random
import time

import pytest

from mstc.plan.solve import Solution, frontier, least_peak, peak_of, solve
from mstc.plan.stages import Choice, Option, Stage


def _option(rng: random.Random) -> Option:
    saved = rng.randrange(40)
    held = saved + rng.randrange(60)
    carry = rng.choice([(0, 0), (0, 0), (15, 15), (15, 40)])
    return Option(Choice((), (), (), ()), saved, held, held + rng.randrange(30), float(rng.randrange(1, 20)), carry)


def _stages(seed: int, count: int, options: int) -> list[Stage]:
    rng = random.Random(seed)

    def stage() -> Stage:
        passing = rng.choice([(0, 0), (0, 0), (10, 0), (0, 25)])
        return Stage((), rng.randrange(20), tuple(_option(rng) for _ in range(options)), passing)

    return [stage() for _ in range(count)]


def _by_hand(stages: list[Stage], resident: int, budget: int) -> tuple[float, int] | None:
    plans = itertools.product(*(s.options for s in stages))
    fitting = [(sum(o.seconds for o in plan), p) for plan in plans if (p := peak_of(stages, plan, resident)) <= budget]
    return min(fitting, default=None)


@pytest.mark.parametrize("seed", range(8))
def test_the_solution_is_the_best_of_all_combinations(seed: int) -> None:
    stages = _stages(seed, 5, 4)
    for budget in range(60, 320, 20):
        found, best = solve(stages, 7, budget), _by_hand(stages, 7, budget)
        assert (found is None) == (best is None)
        if found is not None:
            assert (found.seconds, found.peak) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(8))
def test_less_memory_is_never_faster_and_never_more(seed: int) -> None:
    stages = _stages(seed, 12, 6)
    plans = frontier(stages, 7, most=20)
    assert len(plans) > 1
    for wide, tight in itertools.pairwise(plans):
        assert tight.peak < wide.peak
        assert tight.seconds >= wide.seconds


def test_the_least_peak_is_just_feasible() -> None:
    stages = _stages(3, 4, 4)
    least = least_peak(stages, 7)
    assert least.peak == min(peak_of(stages, plan, 7) for plan in itertools.product(*(s.options for s in stages)))
    assert solve(stages, 7, least.peak - 1) is None
    assert isinstance(solve(stages, 7, least.peak), Solution)


def test_eighty_layers_are_solved_in_seconds() -> None:
    stage = _stages(5, 1, 24)[0]
    spent = []
    for _ in range(3):  # waiting threads count as busy: where others run, one try says little
        started = time.process_time()
        assert solve([stage] * 80, 7, 2000) is not None
        spent.append(time.process_time() - started)
    assert min(spent) < 5
