"""What a step holds, call by call: liveness over the schedule that runs, forward and backward.

The forward makes values and drops each after its last reader, unless the backward keeps it. The backward goes
through the calls in reverse; what a call needs and what was not kept is made again just before, once. Gradients
of parameters stay; a second gradient for the same value is added to the first. What is offloaded goes after its last
reader in the forward and comes back just before its first one in the backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch.fx as fx

from mstc.plan.calls import Call, Step, read_step

CATEGORIES = ("parameters", "inputs", "gradients", "saved", "temporaries")


@dataclass(frozen=True)
class Point:
    """The bytes held while one call runs, by category."""

    label: str
    backward: bool
    held: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.held.values())


@dataclass(frozen=True)
class Timeline:
    """All points of a step in order, and what its forward keeps for the backward."""

    points: tuple[Point, ...]
    kept: frozenset[str] = frozenset()

    @property
    def peak(self) -> Point:
        return max(self.points, key=lambda p: p.total)


@dataclass(frozen=True)
class Border:
    """What a part of a step shares with the calls before and after it.

    entering: memories made before it that nothing reads after it, forward or backward;
    incoming: memories whose gradients the calls after it bring.
    """

    entering: frozenset[str]
    incoming: frozenset[str]


def predict(gm: fx.GraphModule, training: bool = True, fused: bool = True) -> Timeline:
    """The memory of a step of this graph (in normal form, with its loops); ``fused`` as in `read_step`."""
    return simulate(read_step(gm, training, fused))


def simulate(step: Step, border: Border | None = None) -> Timeline:
    """Liveness over the calls of a step; of a part, which has a ``border``, the outputs belong to what comes after."""
    run = _Run(step, border)
    for i, call in enumerate(step.calls):
        run.forward(i, call)
    if step.training:
        run.turn()
        for i in reversed(range(len(step.calls))):
            run.backward(i, step.calls[i])
    return Timeline(tuple(run.points), frozenset(run.kept))


class _Held:
    """A set of memories with the sum of their sizes."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self.names: set[str] = set()
        self.bytes = 0

    def __contains__(self, memory: str) -> bool:
        return memory in self.names

    def add(self, memories: Iterable[str]) -> None:
        for m in memories:
            if m not in self.names:
                self.names.add(m)
                self.bytes += self._sizes[m]

    def drop(self, memories: Iterable[str]) -> None:
        for m in memories:
            if m in self.names:
                self.names.remove(m)
                self.bytes -= self._sizes[m]


@dataclass
class _Run:
    step: Step
    border: Border | None
    points: list[Point] = field(default_factory=list)

    def __post_init__(self) -> None:
        step = self.step
        self._makers = {m: c for c in step.calls for m in c.makes}
        self._offloaded = {m for c in step.calls for m in c.offloads}
        self._fixed = {*step.parameters, *step.inputs}
        self._parameters = sum(step.sizes[m] for m in step.parameters)
        self._inputs = sum(step.sizes[m] for m in step.inputs)
        self._last_read = {m: i for i, c in enumerate(step.calls) for m in (*c.reads, *c.makes)}
        self.kept = self._what_is_kept() if step.training else set()
        self._saved, self._rest = _Held(step.sizes), _Held(step.sizes)
        self._own, self._flowing = _Held(step.sizes), _Held(step.sizes)
        self._dropped_after: dict[int, list[str]] = {}
        needs: dict[str, int] = {}
        for i in reversed(range(len(step.calls))):
            needs |= dict.fromkeys(self._needs_of(step.calls[i]), i)
        for m, i in needs.items():
            self._dropped_after.setdefault(i, []).append(m)
        self._needed = set(needs)
        if self.border is not None:
            self._rest.add(self.border.entering)

    def _what_is_kept(self) -> set[str]:
        """What the backward reads, and what runs again starts from."""
        kept: set[str] = set()
        for call in self.step.calls:
            kept |= {m for m in self._needs_of(call) if not self._makers[m].again}
        return kept

    def _needs_of(self, call: Call) -> set[str]:
        """Memories other than gradients that the call's backward touches, through what must run again."""
        found: set[str] = set()
        stack = list(call.keeps) if call.grads else []
        while stack:
            memory = stack.pop()
            if memory in found or memory in self._fixed:
                continue
            found.add(memory)
            if self._makers[memory].again:
                stack.extend(self._makers[memory].reads)
        return found

    # -- forward -----------------------------------------------------------------------------

    def forward(self, i: int, call: Call) -> None:
        self._hold(call.makes)
        self._note(call, call.cost.work[0], False)
        done = [m for m in (*call.reads, *call.makes) if self._last_read[m] == i]
        self._rest.drop(m for m in done if m not in self.step.outputs)

    def turn(self) -> None:
        """The gradient of the results comes in; nothing is left of the forward but what the backward needs."""
        if self.border is None:
            self._flowing.add(m for m in self.step.outputs if m in self._makers and m in self._makers[m].needs)
        else:
            self._own.add(self.border.incoming & self._fixed)
            self._flowing.add(self.border.incoming - self._fixed)
            self._rest.drop(self.step.outputs)
            self._saved.drop(set(self.step.outputs) - self._needed)

    # -- backward ----------------------------------------------------------------------------

    def backward(self, i: int, call: Call) -> None:
        if call.grads and any(m in self._flowing for m in call.needs):
            self._make_again(call.keeps)
            sizes = self.step.sizes
            second = [m for m in call.grads if m in self._own or m in self._flowing]
            self._own.add(m for m in call.grads if m in self._fixed)
            self._flowing.add(m for m in call.grads if m not in self._fixed)
            doubled = sum(sizes[m] for m in second)
            self._note(call, call.cost.work[1] + doubled, True)
            if doubled:
                self._note(call, doubled + max(sizes[m] for m in second), True)
        self._flowing.drop(call.makes)
        done = self._dropped_after.get(i, ())
        self._saved.drop(done)
        self._rest.drop(done)

    def _make_again(self, memories: Sequence[str]) -> None:
        """Whatever of these is not there, each after what it is made of; not by recursion: scans are long chains."""
        stack = [(m, False) for m in reversed(memories)]
        while stack:
            memory, may_run = stack.pop()
            if memory in self._saved or memory in self._rest or memory in self._fixed:
                continue
            maker = self._makers[memory]
            if memory in self._offloaded:
                self._rest.add((memory,))
            elif may_run:
                self._rest.add(m for m in maker.makes if m in self._needed)
                self._note(maker, maker.cost.work[0], True)
            else:
                stack += [(memory, True), *((read, False) for read in reversed(maker.reads))]

    def _hold(self, memories: Iterable[str]) -> None:
        for m in memories:
            (self._saved if m in self.kept and m not in self._offloaded else self._rest).add((m,))

    def _note(self, call: Call, work: int, backward: bool) -> None:
        rest = self._rest.bytes + self._flowing.bytes + work
        held = (self._parameters, self._inputs, self._own.bytes, self._saved.bytes, rest)
        self.points.append(Point(call.label, backward, dict(zip(CATEGORIES, held, strict=True))))
