"""What each stage holds beyond what its calls tell: the difference to the graph as the lowering parts it.

The calls of a step tell what a choice changes: chunks, what runs again, what is saved inside loops. What the ops
between loops save and hold (routers and experts, scans written in ops, masks) is up to PyTorch's partitioner. So the
step as it was read is compared, stage by stage, with its parted graph, and the difference is added whatever is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.fx as fx

from mstc.ops.loop import is_loop
from mstc.plan.calls import Step
from mstc.plan.devices import Device
from mstc.plan.parted import LOOP_BACKWARD, Schedule
from mstc.plan.stages import Extra, as_read, cut_into_stages

LOOPS = ("loop", "loss", "queries")


def extras_of(step: Step, schedule: Schedule, device: Device, dtype: str) -> tuple[Extra, ...]:
    """One for each stage of a step that was read of the graph behind the schedule."""
    stages = as_read(step, device, dtype)
    places = _places(step, schedule)
    resident = sum(step.sizes[m] for m in (*step.parameters, *step.inputs))
    gradients = _later([stage.gradients for stage in stages])
    saved = [0] * len(stages)
    for node, size in schedule.saved.items():
        saved[places[node]] += size
    most: dict[tuple[int, bool], int] = {}
    for ran in (*schedule.forward, *schedule.backward):
        key = (places[ran.node], ran.point.backward)
        most[key] = max(most.get(key, 0), ran.point.total)
    found, before = [], resident
    for i, (stage, after) in enumerate(zip(stages, gradients, strict=True)):
        option, (beside, behind) = stage.options[0], stage.passing
        told = (before + beside + option.forward, before + behind + after + option.backward)
        forward, backward = (most.get((i, way), told[way]) - told[way] for way in (False, True))
        found.append(Extra(saved[i] - option.saved, forward, backward))
        before += saved[i]
    return tuple(found)


def _later(sizes: Sequence[int]) -> list[int]:
    """Of each the sum of those behind it."""
    return [sum(sizes[i + 1 :]) for i in range(len(sizes))]


def _places(step: Step, schedule: Schedule) -> dict[fx.Node, int]:
    """The stage that each node runs in.

    A stage ends with a loop; loops stand in the parted graph in the order of the calls, their backwards in the reverse.
    """
    known = _Loops(step)
    found: dict[fx.Node, int] = {}
    now = 0
    for ran in schedule.forward:
        found[ran.node] = now
        if is_loop(ran.node):
            now = known.ran(_key(ran.node), now)
    now = known.stages - 1
    for ran in schedule.backward:
        if ran.node.target is LOOP_BACKWARD:
            now = known.comes_back(_key(ran.node), now)
        found[ran.node] = now
    return found


class _Loops:
    """The loops of a step, met one by one in a parted graph; one that was merged with another is passed over."""

    def __init__(self, step: Step) -> None:
        cut = cut_into_stages(step)
        self.stages = len(cut)
        self._calls = [(i, c, c is calls[-1]) for i, calls in enumerate(cut) for c in calls if c.kind in LOOPS]
        self._met: list[tuple[str, int]] = []
        self._next = 0

    def ran(self, key: str, now: int) -> int:
        """The stage behind a loop."""
        for at in range(self._next, len(self._calls)):
            stage, call, last = self._calls[at]
            if call.program is None or call.program.key == key:
                self._next = at + 1
                self._met.append((key, stage))
                return min(stage + last, self.stages - 1)
        return now

    def comes_back(self, key: str, now: int) -> int:
        """The stage of the loop whose backward runs next."""
        at = next((i for i in reversed(range(len(self._met))) if self._met[i][0] == key), None)
        if at is None:
            return now
        stage = self._met[at][1]
        del self._met[at:]
        return stage


def _key(node: fx.Node) -> str:
    return next(a for a in reversed(node.args) if isinstance(a, str))
