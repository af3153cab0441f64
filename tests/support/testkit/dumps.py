"""Dumps of a small model that every pass has something to do for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mstc.dump.explain import explained
from mstc.dump.model import Dump
from mstc.options import parse_options
from testkit.tiny import Tiny, inputs, mean_loss, step

OPTIONS: dict[str, Any] = {
    "lower": "eager",
    "mini_sequence": {"chunk_tokens": 12},
    "lm_head": {"chunk_tokens": 12},
}
WHOLE: dict[str, Any] = {"lower": "eager"}  # so short a sequence is left whole, with a refusal


def explain(fn: Callable[..., Any], *args: Any, options: dict[str, Any]) -> Dump:
    return explained(fn, args, {}, parse_options(options), "python explain.py")[1]


def explain_tiny(options: dict[str, Any] | None = None) -> Dump:
    return explain(step(Tiny(), mean_loss), *inputs(), options=OPTIONS if options is None else options)
