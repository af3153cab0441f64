"""Runs one system through several programs and prints a JSON line for each: ``python -m mstc.cli.heads.worker``.

An error ends the process: the caller takes it as the outcome of the program that was running.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mstc
from mstc.cli.heads.programs import LEAVES, PROGRAMS, Inputs, Result, make_inputs, scalar_of
from mstc.cli.heads.systems import SYSTEMS
from mstc.compat import count_auto_chunkings

__all__ = ["BATCH", "BOUND", "CHUNK", "CLASSES", "LENGTH", "WIDTH", "outcome"]

BATCH, LENGTH, WIDTH, CLASSES, CHUNK = 2, 64, 16, 256, 32
BOUND = 2e-5  # of the loss and of every gradient, in float32


def outcome(system: str, name: str) -> dict[str, str]:
    """What the system makes of the program: "right", "wrong" or "no form", and how it ran it."""
    inputs = make_inputs(BATCH, LENGTH, WIDTH, CLASSES, torch.float32)
    run = SYSTEMS[system].form(name, CHUNK)
    if run is None:
        return {"outcome": "no form", "how": SYSTEMS[system].told.get(name, "")}
    torch.compiler.reset()
    mstc.clear_reports()
    count_auto_chunkings()
    expected_values, expected = _run(PROGRAMS[name].run, inputs)
    values, got = _run(run, inputs)
    wrong = [f"result {n}" for n, (a, b) in enumerate(zip(values, expected_values, strict=True)) if not _close(a, b)]
    wrong += [f"gradient of {n}" for n, g in got.items() if not _same_gradient(g, expected[n])]
    if wrong:
        return {"outcome": "wrong", "how": ", ".join(wrong)}
    return {"outcome": "right", "how": _how(system)}


def _run(run: Callable[[Inputs], Result], inputs: Inputs) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    leaves = {n: getattr(inputs, n) for n in LEAVES}
    for leaf in leaves.values():
        leaf.grad = None
    results = run(inputs)
    torch.autograd.backward(0.5 * scalar_of(results))
    parts = results if isinstance(results, tuple) else (results,)
    return [p.detach() for p in parts], {n: leaf.grad for n, leaf in leaves.items()}


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=BOUND, atol=BOUND)


def _same_gradient(a: Tensor | None, b: Tensor | None) -> bool:
    """Missing says the same as zeros."""
    if a is None or b is None:
        return not any(bool(g.any()) for g in (a, b) if g is not None)
    return float((a - b).norm()) <= BOUND * max(float(b.norm()), 1e-6)


def _how(system: str) -> str:
    if system.startswith("mstc"):
        return mstc_treatment()
    if system == "auto_chunker":
        return "in chunks" if count_auto_chunkings() else "not chunked"
    return "in chunks" if system in ("linear_ce", "liger") else ""


def mstc_treatment() -> str:
    """From the reports: gradients in the forward, recomputed in the backward, or whole, and why."""
    edits = [e.what for r in mstc.reports() for e in r.edits if e.pass_name in ("lm_head", "mini_sequence")]
    if any(e.endswith("gradients in the forward") for e in edits):
        return "in chunks"
    if edits:
        return "in chunks, recomputed"
    return "whole: " + "; ".join(dict.fromkeys(r.reason for report in mstc.reports() for r in report.refusals))


def main() -> None:
    system, *names = sys.argv[1:]
    for name in names:
        record: dict[str, Any] = {"system": system, "program": name, **outcome(system, name)}
        print("RECORD " + json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
