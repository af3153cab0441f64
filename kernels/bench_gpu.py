"""The kernels on a GPU, beside flash attention (SDPA) and fla-core where that is installed.

B T = 128K tokens, T from 1K to 128K, H 16, K = V = 128, bf16; the selective scan D 2048, N 16. The floor is the greater
of two times: that in which the device can read the inputs and write the outputs once (the backward: also their
gradients), and that in which it can do the step's operations. ``share`` is floor / time. Without a GPU a few tokens
run on the CPU, so that the commands are known to work, and nothing is called measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mstc.kernels.bench_cases import SCAN, Form, Sizes, Step, case, make_step

__all__ = ["count", "run"]

TOKENS = 128 * 1024
LENGTHS = [1024 * 2**i for i in range(8)]
ON_GPU = Sizes(1024, heads=16, width=128, channels=2048, dtype=torch.bfloat16, device="cuda")
DRY = Sizes(64, heads=2, width=16, channels=32)
DRY_TOKENS, DRY_LENGTHS = 128, [64, 128]
PEAKS = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.0e12, 312e12)}
"""Bytes and dense bf16 operations per second, as the makers' data sheets state them (SXM, A100 with 80 GB)."""
FLA: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "none": ("fla.ops.linear_attn", "chunk_linear_attn", ("q", "k", "v"), {"normalize": False}),
    "scalar": ("fla.ops.simple_gla", "chunk_simple_gla", ("q", "k", "v", "g"), {}),
    "vector": ("fla.ops.gla", "chunk_gla", ("q", "k", "v", "g"), {}),
    "delta": ("fla.ops.delta_rule", "chunk_delta_rule", ("q", "k", "v", "beta"), {}),
    "gated delta": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", ("q", "k", "v", "g", "beta"), {}),
    "dplr": (
        "fla.ops.generalized_delta_rule.dplr",
        "chunk_dplr_delta_rule",
        ("q", "k", "v", "a", "b", "gk"),
        {},
    ),
}
"""Class -> (module, function, names of its tensors, further arguments); each returns (output, state)."""
Row = dict[str, Any]


def count(names: Sequence[str], lengths: Sequence[int] | None) -> int:
    """How many measurements ``run`` makes at most."""
    found = lengths or (LENGTHS if torch.cuda.is_available() else DRY_LENGTHS)
    return len(found) * 2 * (1 + sum(1 + (name in FLA) for name in _all(names)))


def run(names: Sequence[str], lengths: Sequence[int] | None, rounds: int, advance: Callable[[str], None]) -> list[Row]:
    """A row per system, length and direction; printed as they come."""
    gpu = torch.cuda.is_available()
    if not gpu:
        print("no GPU here: nothing is measured; a dry run of a few tokens on the CPU")
    if gpu and find_spec("fla") is None:
        print("fla-core is not installed (pip install fla-core): not measured")
    total, found, like = (TOKENS, lengths or LENGTHS, ON_GPU) if gpu else (DRY_TOKENS, lengths or DRY_LENGTHS, DRY)
    print(f"{'T':>7} {'system':28} {'direction':20} {'ms':>10} {'floor ms':>9} {'share':>6}  bound by")
    rows = []
    for tokens in found:
        sizes = replace(like, tokens=tokens, batch=max(1, total // tokens))
        for system, own, form, tensors in _systems(["softmax", *_all(names)], sizes, gpu):
            for backward in (False, True):
                advance(f"{system}, {tokens} tokens")
                row = _measure(own, form, tensors, backward, rounds, gpu)
                rows.append({"system": system, "tokens": tokens, "batch": sizes.batch, "measured": gpu, **row})
                _print(rows[-1])
    return rows


def _all(names: Sequence[str]) -> list[str]:
    return [*(n for n in names if n != SCAN), SCAN]


def _systems(names: Sequence[str], sizes: Sizes, gpu: bool) -> list[tuple[str, Form, Form, list[Tensor]]]:
    """(system, our function of the class, the system's own, tensors): ours, and fla's where it has the class."""
    systems = []
    for name in names:
        form, tensors = case(name, sizes)
        systems.append((name, form, form, tensors))
        theirs = _fla(name) if gpu else None
        if theirs is not None:
            systems.append((f"{name}, fla-core", form, theirs, tensors))
    return systems


def _fla(name: str) -> Form | None:
    """fla's function of a class, or None where it is not installed or lacks the class."""
    if name not in FLA or find_spec("fla") is None:
        return None
    module, function, arguments, further = FLA[name]
    call = getattr(import_module(module), function)

    def form(*tensors: Tensor) -> Tensor:
        out: Tensor = call(**dict(zip(arguments, tensors, strict=True)), **further)[0]
        return out

    return form


def _measure(own: Form, form: Form, tensors: Sequence[Tensor], backward: bool, rounds: int, gpu: bool) -> Row:
    direction = "forward + backward" if backward else "forward"
    leaves = [t.detach() for t in tensors]
    try:
        step = make_step(form, leaves, backward)
        if not gpu:
            step()
        ms = _time(step, rounds) if gpu else None
    except torch.OutOfMemoryError:
        return {"direction": direction, "ms": None, "floor_ms": None, "bound_by": "out of memory"}
    floor, bound = _floor(own, leaves, backward) if gpu else (None, None)
    return {"direction": direction, "ms": ms, "floor_ms": floor, "bound_by": bound}


def _time(step: Step, rounds: int) -> float:
    """The least time in ms, between events on the device."""
    for _ in range(3):
        step()
    best = float("inf")
    for _ in range(max(rounds, 5)):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(stop))
    return best


def _floor(form: Form, tensors: Sequence[Tensor], backward: bool) -> tuple[float | None, str | None]:
    """(ms, "memory" or "compute") of this device for our form of a class, None where its peaks are not known."""
    device = torch.cuda.get_device_name()
    peaks = next((value for key, value in PEAKS.items() if key in device), None)
    if peaks is None:
        return None, None
    with torch.no_grad():
        outputs = form(*tensors).nbytes
    held = sum(t.nbytes for t in tensors)
    moved = held + outputs + (held + outputs if backward else 0)
    with FlopCounterMode(display=False) as counter:
        make_step(form, tensors, backward)()
    memory, compute = 1e3 * moved / peaks[0], 1e3 * counter.get_total_flops() / peaks[1]
    return max((memory, "memory"), (compute, "compute"))


def _print(row: Row) -> None:
    ms, floor = row["ms"], row["floor_ms"]
    numbers = f"{_or_dash(ms, 3):>10} {_or_dash(floor, 3):>9} {_or_dash(floor and ms and floor / ms, 2):>6}"
    print(f"{row['tokens']:7} {row['system']:28} {row['direction']:20} {numbers}  {row['bound_by'] or '-'}", flush=True)


def _or_dash(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
