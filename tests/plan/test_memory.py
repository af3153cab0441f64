"""Liveness over small schedules, worked out by hand."""

from __future__ import annotations

from dataclasses import replace

from mstc.plan.calls import Call, Step
from mstc.plan.memory import simulate
from mstc.plan.work import Cost

# x -> a (kept) -> b -> loss; w and v are parameters.
_SIZES = {"x": 10, "w": 100, "v": 200, "a": 30, "b": 50, "loss": 1}


def _step(again: bool = False, training: bool = True) -> Step:
    first = Call("f", "f", "loop", ("x", "w"), ("a",), ("x",), ("w",), ("a",), Cost((3, 4)))
    second = Call("g", "g", "loop", ("a", "v"), ("b",), ("a",), ("a", "v"), ("b",), Cost((5, 6)), again=again)
    last = Call("h", "h", "op", ("b",), ("loss",), ("b",), ("b",), ("loss",))
    return Step([first, second, last], dict(_SIZES), ("w", "v"), ("x",), ("loss",), training)


def _totals(step: Step) -> list[int]:
    return [p.total - 310 for p in simulate(step).points]


def test_the_forward_drops_what_nothing_reads_again() -> None:
    # a while f runs; a and b while g runs, then a goes; b and the loss.
    assert _totals(_step(training=False)) == [30 + 3, 30 + 50 + 5, 50 + 1]


def test_the_backward_frees_what_it_has_read() -> None:
    forward = [30 + 3, 30 + 50 + 5, 30 + 50 + 1]
    h = 30 + 50 + 1 + 1 + 50  # a, b, the loss, its gradient and b's
    g = 30 + 1 + 50 + 30 + 200 + 6  # a, the loss, b's gradient; a's and v's
    f = 1 + 30 + 200 + 100 + 4
    assert _totals(_step()) == [*forward, h, g, f]


def test_what_runs_again_is_made_just_before_it_is_read() -> None:
    points = simulate(_step(again=True)).points
    assert [p.label for p in points] == ["f", "g", "h", "g", "h", "g", "f"]
    assert points[2].total - 310 == 30 + 50 + 1
    assert points[3].total - 310 == 30 + 1 + 1 + 50 + 5
    assert simulate(_step(again=True)).kept == {"a"}


def test_a_long_chain_runs_again() -> None:
    """As of a scan written as a loop over tokens."""
    names = [f"s{i}" for i in range(2000)]
    steps = [
        Call("f", "f", "op", (a,), (b,), (a,), (a,), (b,), again=True)
        for a, b in zip(["x", *names], names, strict=False)
    ]
    last = Call("h", "h", "op", (names[-1],), ("loss",), (names[-1],), (names[-1],), ("loss",))
    step = Step([*steps, last], dict.fromkeys(["x", *names, "loss"], 1), (), ("x",), ("loss",), True)
    points = simulate(step).points
    assert [p.label for p in points] == ["f"] * 2000 + ["h"] + ["f"] * 2000 + ["h"] + ["f"] * 2000
    assert max(p.total for p in points) == 1 + 2000 + 3  # x, the chain, the loss, its gradient and one more


def test_what_is_offloaded_is_held_only_where_it_is_read() -> None:
    step = _step()
    step.calls[0] = replace(step.calls[0], offloads=("a",))
    forward = [30 + 3, 30 + 50 + 5, 50 + 1]
    h = 50 + 1 + 1 + 50
    g = 1 + 50 + 30 + 30 + 200 + 6  # a comes back
    f = 1 + 30 + 200 + 100 + 4
    assert _totals(step) == [*forward, h, g, f]


def test_a_second_gradient_is_held_beside_the_first_and_their_sum() -> None:
    step = _step()
    step.calls[1] = replace(step.calls[1], keeps=("a",), grads=("a", "v"))
    step.calls[2] = replace(step.calls[2], reads=("b", "a"), keeps=("b",), grads=("b", "a"))
    totals = _totals(step)
    # g adds a second gradient of a: both, then their sum beside them.
    assert 30 + 1 + 50 + 30 + 200 + 30 + 6 in totals
    assert 30 + 1 + 50 + 30 + 200 + 60 in totals


def test_categories_add_up() -> None:
    peak = simulate(_step()).peak
    assert peak.held == {"parameters": 300, "inputs": 10, "gradients": 300, "saved": 0, "temporaries": 35}
