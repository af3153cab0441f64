"""What the stages of a step share: values that later ones read, and gradients that these bring back.

In a stack of layers each stage hands the residual stream to the next, and no more. With skip connections, outputs of
all layers read by all later ones, keys and values of one layer read by others, or weights that several layers share,
more lies by while a stage runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mstc.plan.calls import Call, Step
from mstc.plan.memory import Border


@dataclass(frozen=True)
class Shared:
    """What a stage shares with the others, as names of memories where nothing else is said.

    inner: made in it; outer: read in it and made elsewhere; later: made in it and read in others; kept: made in it
    and saved whatever is chosen; once: names of its calls that never run again, since other stages read their results;
    gradients, passing: as of `mstc.plan.stages.Stage`.
    """

    inner: frozenset[str]
    outer: frozenset[str]
    later: frozenset[str]
    kept: frozenset[str]
    border: Border
    once: frozenset[str]
    gradients: int
    passing: tuple[int, int]

    def part(self, step: Step, calls: Sequence[Call]) -> Step:
        """The calls of the stage, as chosen, as a step of their own."""
        outer = tuple(self.outer - self.border.entering)
        return Step(list(calls), step.sizes, outer, (), tuple(self.later), step.training)


def can_run_again(call: Call) -> bool:
    """Loops that lead only to mixers, and mixers."""
    return call.kind == "mixer" or (call.kind == "loop" and call.again)


def shared_by(step: Step, cut: Sequence[Sequence[Call]]) -> list[Shared]:
    """What each of the stages, ``cut`` in order, shares with the others."""
    return _Reader(step, cut).found()


class _Reader:
    def __init__(self, step: Step, cut: Sequence[Sequence[Call]]) -> None:
        self._step, self._cut = step, cut
        self._made_in = {m: i for i, calls in enumerate(cut) for c in calls for m in c.makes}
        self._last_read = {m: i for i, calls in enumerate(cut) for c in calls for m in c.reads}
        reads = ((i, m) for i, calls in enumerate(cut) for c in calls for m in c.reads)
        self._handed_on = {m for i, m in reads if self._made_in.get(m) != i} | set(step.outputs)
        self._once = {c.name for c in step.calls if not can_run_again(c) or self._handed_on.intersection(c.makes)}
        made_once = {m for c in step.calls if c.name in self._once for m in c.makes}
        self._kept = (read_backward(step) & made_once) | set(step.outputs)
        self._dropped = self._handed_on - self._kept

    def found(self) -> list[Shared]:
        brought = {m for c in self._step.calls for m in c.needs if m in self._step.outputs}
        found = []
        for i in reversed(range(len(self._cut))):
            found.append(self._stage(i, brought))
            brought |= {m for c in self._cut[i] for m in c.grads}
        return found[::-1]

    def _stage(self, i: int, brought: set[str]) -> Shared:
        """brought: memories whose gradients later stages bring."""
        calls, parameters = self._cut[i], set(self._step.parameters)
        inner = frozenset(m for c in calls for m in c.makes)
        outer = frozenset(m for c in calls for m in (*c.reads, *c.grads)) - inner
        before = {m for m in self._dropped if self._made_in.get(m, i) < i}
        behind = {m for m in brought - parameters - outer if self._made_in.get(m, i) < i}
        entering = frozenset(m for m in before if self._last_read[m] == i)
        own = {m for c in calls for m in c.grads if m in parameters} - brought
        return Shared(
            inner,
            outer,
            inner & self._handed_on,
            inner & self._kept,
            Border(entering, frozenset(brought & (inner | outer))),
            frozenset(c.name for c in calls if c.name in self._once),
            self._bytes(own),
            (self._bytes(m for m in before if self._last_read[m] > i), self._bytes(behind)),
        )

    def _bytes(self, memories: Iterable[str]) -> int:
        return sum(self._step.sizes[m] for m in memories)


def read_backward(step: Step) -> set[str]:
    """What the backward of some call reads, or what it runs again starts from."""
    found = {m for c in step.calls for m in c.keeps}
    for c in reversed(step.calls):
        if c.again and found.intersection(c.makes):
            found |= set(c.reads)
    return found
