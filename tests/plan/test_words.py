"""A plan in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from mstc.plan.calls import Call
from mstc.plan.words import bytes_text, count_text, counted, in_words

_LOOP: Any = mock.sentinel.program


def _call(label: str, kind: str = "loop", **more: Any) -> Call:
    program = _LOOP if kind in ("loop", "loss") else None
    return replace(Call(label, label, kind, (), ()), **{"program": program, **more})


def test_what_runs_alike_is_said_once() -> None:
    calls = [
        _call("q/k/v", chunks=4, again=True),
        _call("attention", "mixer"),
        _call("view", "op"),
        _call("MLP", chunks=4),
        _call("q/k/v", chunks=4, again=True),
        _call("attention", "mixer"),
        _call("MLP", chunks=4),
        _call("head", "loss", chunks=1),
    ]
    assert in_words(calls) == [
        "2 x q/k/v: 4 chunks, again in the backward",
        "2 x attention",
        "2 x MLP: 4 chunks",
        "1 x head: 1 chunk",
    ]


def test_what_holds_of_some_is_counted() -> None:
    calls = [
        _call("MLP", chunks=2, saved=("a",)),
        _call("MLP", chunks=8, saved=("a", "b", "c")),
        _call("MLP", chunks=4, offloads=("r",)),
        _call("attention", "mixer", again=True),
        _call("attention", "mixer"),
    ]
    assert in_words(calls) == [
        "3 x MLP: 2 to 8 chunks, saves 1 to 3 values inside (2 of 3), offloaded (1 of 3)",
        "2 x attention: again in the backward (1 of 2)",
    ]


def test_an_empty_plan_says_nothing() -> None:
    assert in_words([_call("view", "op")]) == []


@pytest.mark.parametrize(("n", "said"), [(0, "0 B"), (1536, "1.5 KiB"), (2**40, "1.0 TiB"), (3 * 2**30, "3.0 GiB")])
def test_bytes(n: int, said: str) -> None:
    assert bytes_text(n) == said


@pytest.mark.parametrize(("n", "said"), [(12, "12 "), (1.5e12, "1.5 T"), (2e15, "2.0 P")])
def test_counts(n: float, said: str) -> None:
    assert count_text(n) == said


@pytest.mark.parametrize(
    ("n", "what", "said"),
    [(1, "chunk", "1 chunk"), (0, "op", "0 ops"), (1, "query", "1 query"), (2, "query", "2 queries")],
)
def test_counted(n: int, what: str, said: str) -> None:
    assert counted(n, what) == said
