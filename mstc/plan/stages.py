"""A step cut into stages, and what each stage could cost: the table that the solver chooses from.

A stage ends with a loop whose results are kept in any case (a layer: norm + q/k/v, attention, and the rest up to the
residual stream). With everything before it reduced to the bytes that it keeps,

    peak = max over stages i of  resident + sum_{j<i} saved_j + forward_i
                                 resident + sum_{j<i} saved_j + sum_{j>i} gradients_j + backward_i,

so stages that are alike are measured once. What a stage offloads is not saved, but where the next stage reads it, it
is held there again, as is what the next stage reads and no backward does: `Option.carry` bytes, which the solver adds
to the stage that follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
class Stage:
    """Calls that are chosen for together; gradients: bytes of those of its parameters."""

    calls: tuple[Call, ...]
    gradients: int
    options: tuple[Option, ...]


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


def stages_of(step: Step, device: Device, dtype: str, levers: Levers = ALL_LEVERS) -> list[Stage]:
    """The stages of a step with the options of each; dtype: by name, of its products.

    Stages that are alike are measured once.
    """
    bench = _Bench(step, device, dtype, levers)
    known: dict[Any, Stage] = {}
    found = []
    cut = list(_cut(step))
    movable = _movable(step, cut) if levers.offload and step.training else [()] * len(cut)
    for calls, places in zip(cut, movable, strict=True):
        key = (places, *(_shape(c, step) for c in calls))
        if key not in known:
            known[key] = bench.stage(calls, places)
        found.append(replace(known[key], calls=tuple(calls)))
    return found


def can_run_again(call: Call) -> bool:
    """Loops that lead only to mixers, and mixers."""
    return call.kind == "mixer" or (call.kind == "loop" and call.again)


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


def _cut(step: Step) -> Iterator[list[Call]]:
    stage: list[Call] = []
    for call in step.calls:
        stage.append(call)
        if call.kind in ("loop", "loss") and not call.again:
            yield stage
            stage = []
    if stage:
        yield stage


def _shape(call: Call, step: Step) -> tuple[object, ...]:
    """What two calls that cost the same share."""
    program = call.program.key if call.program is not None else call.label
    savings = tuple(s.program.key for s in call.savings)
    return (program, savings, call.again, tuple(step.sizes[m] for m in (*call.reads, *call.makes)), call.cost.flops)


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
    kept = {m for c in step.calls for m in c.keeps} | {m for c in step.calls if c.again for m in c.reads}

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
    calls: Sequence[Call], training: bool, levers: Levers, movable: Sequence[tuple[int, int]] = ()
) -> Iterator[Choice]:
    loops = [c for c in calls if c.program is not None]
    sizes = [_counts(c, levers) for c in loops]
    again = [
        (False, True) if training and (levers.attention if c.kind == "mixer" else levers.recompute) else (False,)
        for c in calls
        if can_run_again(c)
    ]
    saves = [range(1 + len(c.savings)) if levers.saves else range(1) for c in loops]
    deepest = max((len(s) for s in sizes), default=1)
    for level, flags, saved in itertools.product(range(deepest), itertools.product(*again), itertools.product(*saves)):
        counts = tuple(s[min(level, len(s) - 1)] for s in sizes)
        yield Choice(counts, flags, (), saved)
        repeats = iter(flags)
        once = {i for i, c in enumerate(calls) if not (can_run_again(c) and next(repeats))}
        places = tuple((at, j) for at, j in movable if at in once)
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
        # Results that the backward of some call reads, whatever is chosen.
        always = {m for c in step.calls for m in c.keeps} | {m for c in step.calls if c.again for m in c.reads}
        self._kept = always & {m for c in step.calls if not can_run_again(c) for m in c.makes}

    def stage(self, calls: list[Call], movable: Sequence[tuple[int, int]]) -> Stage:
        """These calls with all options; movable: results that may be offloaded, by the positions of call and result."""
        step, levers = self._step, self._levers
        gradients = self._bytes({m for c in calls for m in c.grads if m in step.parameters})
        options = [self._option(calls, choice) for choice in _choices(calls, step.training, levers, movable)]
        return Stage(tuple(calls), gradients, tuple(_undominated(options) if levers.pruned else options))

    def _option(self, calls: list[Call], choice: Choice) -> Option:
        step = self._step
        chosen = apply_choice(calls, choice)
        inner = {m for c in calls for m in c.makes}
        later = self._read_outside(calls) & inner
        outer = {m for c in calls for m in (*c.reads, *c.grads)} - inner
        timeline = simulate(Step(chosen, step.sizes, tuple(outer), (), tuple(later), step.training), part=True)
        base = self._bytes(outer)
        offloaded = {m for c in chosen for m in c.offloads}
        saved = ((timeline.kept | (self._kept & inner)) - offloaded) | (inner & set(step.outputs))
        away, behind = self._bytes(offloaded), self._bytes(offloaded & later)
        # Where copies overlap, what the stage before needs is on its way already while this one runs its backward.
        carry = (
            behind + self._bytes(later - saved - offloaded),
            behind + away if self._device.overlaps else behind,
        )
        return Option(
            choice,
            self._bytes(saved),
            max(p.total for p in timeline.points if not p.backward) - base,
            max((p.total for p in timeline.points if p.backward), default=base) - base,
            seconds(chosen, self._device, self._dtype, step.training, away),
            carry,
            away,
        )

    def _bytes(self, memories: Iterable[str]) -> int:
        return sum(self._step.sizes[m] for m in memories)

    def _read_outside(self, calls: list[Call]) -> set[str]:
        names = {c.name for c in calls}
        return {m for c in self._step.calls if c.name not in names for m in c.reads} | set(self._step.outputs)


def _undominated(options: list[Option]) -> list[Option]:
    """Options that no other beats in every respect."""

    def beats(a: Option, b: Option) -> bool:
        x = (a.saved, a.forward, a.backward, a.seconds, *a.carry)
        y = (b.saved, b.forward, b.backward, b.seconds, *b.carry)
        return x != y and all(i <= j for i, j in zip(x, y, strict=True))

    return [o for o in options if not any(beats(other, o) for other in options)]
