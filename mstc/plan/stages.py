"""A step cut into stages, and what each stage could cost: the table that the solver chooses from.

A stage ends with a loop whose results are kept in any case (a layer: norm + q/k/v, attention, and the rest up to the
residual stream). With everything before it reduced to the bytes that it keeps,

    peak = max over stages i of  resident + sum_{j<i} saved_j + forward_i
                                 resident + sum_{j<i} saved_j + sum_{j>i} gradients_j + backward_i,

so stages that are alike are measured once. What a stage offloads is not saved, but where the next stage reads it, it
is held there again: `Option.carry` bytes, which the solver adds to the stage that follows. What other stages hand to
each other over this one (skip connections, and their gradients) is in `Stage.passing`; see `borders.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from mstc.plan.borders import Shared, can_run_again, read_backward, shared_by
from mstc.plan.calls import Call, Step
from mstc.plan.devices import Device
from mstc.plan.memory import simulate

FEWEST_BYTES = 64 * 1024  # of a value that is worth a copy to the host and back
FEWEST_TOKENS = 128  # a chunk below this many rows leaves every machine idle


@dataclass(frozen=True)
class Choice:
    """How a stage runs: chunks of each of its loops, which calls run again in the backward, which results
    (by the positions of call and result) are offloaded, and for each loop the level of its savings."""

    counts: tuple[int, ...]
    again: tuple[bool, ...]
    offload: tuple[tuple[int, int], ...]
    saves: tuple[int, ...]


@dataclass(frozen=True)
class Option:
    """A choice with its costs: bytes kept for the backward, bytes held in its forward and backward, seconds.

    carry: bytes of it that the next stage holds beside its own, in its forward and backward; offloaded: bytes.
    """

    choice: Choice
    saved: int
    forward: int
    backward: int
    seconds: float
    carry: tuple[int, int] = (0, 0)
    offloaded: int = 0


@dataclass(frozen=True)
class Extra:
    """Bytes of a stage beyond what its calls tell, whatever is chosen: saved, held in its forward and its backward."""

    saved: int = 0
    forward: int = 0
    backward: int = 0

    def of(self, option: Option) -> Option:
        """The option with them."""
        saved = max(option.saved + self.saved, 0)
        return replace(
            option, saved=saved, forward=option.forward + self.forward, backward=option.backward + self.backward
        )


@dataclass(frozen=True)
class Stage:
    """Calls that are chosen for together.

    gradients: bytes of those of its parameters that no later stage has brought; passing: bytes that stages before and
    after it hand to each other while it runs its forward and backward, saved values left out.
    """

    calls: tuple[Call, ...]
    gradients: int
    options: tuple[Option, ...]
    passing: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Levers:
    """What the solver may use; fewer are tried to tell what each brings. pruned: leave out what never pays.

    saves: values inside loops may be saved, which takes memory to win time; the others do the reverse.
    """

    chunks: bool = True
    recompute: bool = True
    attention: bool = True
    saves: bool = True
    offload: bool = False
    pruned: bool = True


ALL_LEVERS = Levers()


def stages_of(
    step: Step, device: Device, dtype: str, levers: Levers = ALL_LEVERS, extras: Sequence[Extra] = ()
) -> list[Stage]:
    """The stages of a step with the options of each; dtype: by name, of its products; extras: of each stage, where they
    are known.

    Stages that are alike are measured once.
    """
    bench = _Bench(step, device, dtype, levers)
    known: dict[Any, tuple[Option, ...]] = {}
    found = []
    cut = cut_into_stages(step)
    movable = _movable(step, cut) if levers.offload and step.training else [()] * len(cut)
    for calls, places, shared, extra in zip(
        cut, movable, shared_by(step, cut), extras or [Extra()] * len(cut), strict=True
    ):
        key = (places, extra, _shape(calls, shared, step))
        if key not in known:
            known[key] = tuple(map(extra.of, bench.options(calls, shared, places)))
        found.append(Stage(tuple(calls), shared.gradients, known[key], shared.passing))
    return found


def as_read(step: Step, device: Device, dtype: str) -> list[Stage]:
    """The stages of a step, each with one option: as it was read."""
    bench = _Bench(step, device, dtype, ALL_LEVERS)
    cut = cut_into_stages(step)
    return [
        Stage(tuple(calls), shared.gradients, (bench.as_read(calls, shared),), shared.passing)
        for calls, shared in zip(cut, shared_by(step, cut), strict=True)
    ]


def apply_choice(calls: Sequence[Call], choice: Choice) -> list[Call]:
    """The calls as chosen."""
    counts, again = iter(choice.counts), iter(choice.again)
    saves = iter(choice.saves)
    chosen = []
    for i, call in enumerate(calls):
        if call.program is not None:
            call = call.saving(next(saves)).in_chunks(next(counts))
        if can_run_again(call):
            call = replace(call, again=next(again))
        call = replace(call, offloads=tuple(call.makes[j] for at, j in choice.offload if at == i))
        chosen.append(call)
    return chosen


def seconds(calls: Sequence[Call], device: Device, dtype: str, training: bool, offloaded: int = 0) -> float:
    """Forward, backward, what runs again, and bytes that leave in the one and come back in the other."""
    forward = backward = 0.0
    for c in calls:
        mixer, x = c.kind == "mixer", c.cost
        once = device.seconds(x.flops[0], x.moved[0], x.rows, x.kernels[0], dtype, mixer, x.fresh[0])
        forward += once
        backward += once if c.again and training else 0.0
        if training and c.grads:
            backward += device.seconds(x.flops[1], x.moved[1], x.rows, x.kernels[1], dtype, mixer, x.fresh[1])
    copies = offloaded / device.link
    if device.overlaps:
        return max(forward, copies) + max(backward, copies)
    return forward + backward + 2 * copies


def cut_into_stages(step: Step) -> list[list[Call]]:
    """The calls of each stage."""
    stages: list[list[Call]] = [[]]
    for call in step.calls:
        stages[-1].append(call)
        if ends_stage(call):
            stages.append([])
    return stages if stages[-1] else stages[:-1]


def ends_stage(call: Call) -> bool:
    return call.kind in ("loop", "loss") and not call.again


def _shape(calls: Sequence[Call], shared: Shared, step: Step) -> tuple[object, ...]:
    """What two stages that cost the same have in common: programs, and which memories flow where."""
    numbers: dict[str, int] = {}

    def numbered(memories: Iterable[str]) -> tuple[int, ...]:
        return tuple(numbers.setdefault(m, len(numbers)) for m in memories)

    wiring = []
    for c in calls:
        program = c.program.key if c.program is not None else c.label
        savings = tuple(s.program.key for s in c.savings)
        flows = tuple(numbered(memories) for memories in (c.reads, c.makes, c.keeps, c.grads, c.needs))
        wiring.append((program, savings, c.again, c.name in shared.once, c.cost.flops, flows))
    border = shared.border
    sets = (shared.inner, shared.later, shared.kept, border.entering, border.incoming, set(step.parameters))
    kinds = tuple((step.sizes[m], *(m in one for one in sets)) for m in numbers)
    return (tuple(wiring), kinds)


def _movable(step: Step, cut: Sequence[list[Call]]) -> list[tuple[tuple[int, int], ...]]:
    """Of each stage the results that may be offloaded, by the positions of call and result.

    Those that the backward keeps and that only this stage and the next one read: what many stages read would come
    back for each of them. Of attention the output; the log-sum-exp is a fraction of it. Not q, k and v: to run their
    loop again takes less time than three copies.
    """
    stage_of = {c.name: i for i, calls in enumerate(cut) for c in calls}
    last: dict[str, int] = {}
    for c in step.calls:
        last |= dict.fromkeys((*c.reads, *c.keeps), stage_of[c.name])
    kept = read_backward(step)

    def movable(i: int, call: Call, result: int) -> bool:
        memory = call.makes[result]
        if call.kind == "loop" and can_run_again(call):
            return False
        alone = call.kind == "loop" and call.program is not None and result < len(call.program.outputs)
        alone = alone or (call.kind != "loss" and call.program is None and result == 0)
        large = step.sizes[memory] >= FEWEST_BYTES and memory not in step.outputs
        return alone and large and memory in kept and last.get(memory, i) <= i + 1

    return [
        tuple((at, j) for at, c in enumerate(calls) for j in range(len(c.makes)) if movable(i, c, j))
        for i, calls in enumerate(cut)
    ]


def _choices(
    calls: Sequence[Call], once: Set[str], training: bool, levers: Levers, movable: Sequence[tuple[int, int]] = ()
) -> Iterator[Choice]:
    """once: names of calls that never run again."""

    def flags_of(call: Call) -> tuple[bool, ...]:
        lever = levers.attention if call.kind == "mixer" else levers.recompute
        return (False, True) if training and lever and call.name not in once else (False,)

    loops = [c for c in calls if c.program is not None]
    sizes = [_counts(c, levers) for c in loops]
    again = [flags_of(c) for c in calls if can_run_again(c)]
    saves = [range(1 + len(c.savings)) if levers.saves else range(1) for c in loops]
    deepest = max((len(s) for s in sizes), default=1)
    for level, flags, saved in itertools.product(range(deepest), itertools.product(*again), itertools.product(*saves)):
        counts = tuple(s[min(level, len(s) - 1)] for s in sizes)
        yield Choice(counts, flags, (), saved)
        repeats = iter(flags)
        runs_once = {i for i, c in enumerate(calls) if not (can_run_again(c) and next(repeats))}
        places = tuple((at, j) for at, j in movable if at in runs_once)
        if places:
            yield Choice(counts, flags, places, saved)


def _counts(call: Call, levers: Levers) -> list[int]:
    """Numbers of chunks from one on, each about twice the one before, dividing the length where one near does."""
    p = call.program
    assert p is not None
    rows = max(int(call.cost.rows * p.count / max(p.n, 1)), 1)
    counts = [1]
    while levers.chunks and p.n * rows // (2 * counts[-1]) >= FEWEST_TOKENS and 2 * counts[-1] <= p.n:
        wanted = 2 * counts[-1]
        counts.append(next((c for c in range(wanted, min(wanted + wanted // 2, p.n) + 1) if p.n % c == 0), wanted))
    return counts


class _Bench:
    """Measures what the stages of a step cost, each run by itself."""

    def __init__(self, step: Step, device: Device, dtype: str, levers: Levers) -> None:
        self._step, self._device, self._dtype, self._levers = step, device, dtype, levers

    def options(self, calls: list[Call], shared: Shared, movable: Sequence[tuple[int, int]]) -> tuple[Option, ...]:
        """How these calls may run; movable: results that may be offloaded, by the positions of call and result."""
        levers = self._levers
        choices = _choices(calls, shared.once, self._step.training, levers, movable)
        options = [self._option(calls, shared, choice) for choice in choices]
        return tuple(_undominated(options) if levers.pruned else options)

    def as_read(self, calls: list[Call], shared: Shared) -> Option:
        loops = [c for c in calls if c.program is not None]
        again = tuple(c.again for c in calls if can_run_again(c))
        return self._option(calls, shared, Choice(tuple(c.chunks for c in loops), again, (), (0,) * len(loops)))

    def _option(self, calls: list[Call], shared: Shared, choice: Choice) -> Option:
        step, border = self._step, shared.border
        chosen = apply_choice(calls, choice)
        timeline = simulate(shared.part(step, chosen), border)
        before = self._bytes(shared.outer - border.entering)
        brought = self._bytes(border.incoming.intersection(step.parameters))
        offloaded = {m for c in chosen for m in c.offloads}
        saved = (timeline.kept | shared.kept) - offloaded
        away, behind = self._bytes(offloaded), self._bytes(offloaded & shared.later)
        # Where copies overlap, what the stage before needs is on its way already while this one runs its backward.
        carry = (behind, behind + away if self._device.overlaps else behind)
        return Option(
            choice,
            self._bytes(saved),
            max(p.total for p in timeline.points if not p.backward) - before,
            max((p.total - before - brought for p in timeline.points if p.backward), default=0),
            seconds(chosen, self._device, self._dtype, step.training, away),
            carry,
            away,
        )

    def _bytes(self, memories: Iterable[str]) -> int:
        return sum(self._step.sizes[m] for m in memories)


def _undominated(options: list[Option]) -> list[Option]:
    """Options that no other beats in every respect."""

    def beats(a: Option, b: Option) -> bool:
        x = (a.saved, a.forward, a.backward, a.seconds, *a.carry)
        y = (b.saved, b.forward, b.backward, b.seconds, *b.carry)
        return x != y and all(i <= j for i, j in zip(x, y, strict=True))

    return [o for o in options if not any(beats(other, o) for other in options)]
