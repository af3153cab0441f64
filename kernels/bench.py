"""Times of the kernels on a CPU: each class beside softmax attention, the systems alternating in one run.

    python -m mstc.kernels.bench --threads 2 --lengths 2048 16384

B 1, H 8, K = V = 64, float32, forward + backward. Each figure is the least of the rounds, in
milliseconds; the selective scan (D 512, N 16) stands beside its token loop. Peak memory is what a
process of its own gains over its inputs, outputs and gradients held, as a multiple of them.
"""

from __future__ import annotations

import argparse
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention

from mstc.kernels.api import dplr_attention, linear_attention
from mstc.kernels.selective_scan.op import selective_scan
from mstc.kernels.selective_scan.reference import reference as token_loop

__all__ = ["CLASSES", "main"]

HEADS, WIDTH, CHANNELS, COLUMNS = 8, 64, 512, 16
CLASSES = ["none", "scalar", "vector", "delta", "gated delta", "dplr", "window 512"]
Step = Callable[[], None]
Clock = Callable[[], float]


def _inputs(name: str, length: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A class as a function of its tensors, and the tensors."""
    from mstc.kernels.sliding_window.op import sliding_window_attention

    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, HEADS, WIDTH) for _ in range(3))
    k = normalize(k, dim=-1)
    scalar, vector = -torch.rand(1, length, HEADS), -torch.rand(1, length, HEADS, WIDTH)
    beta = torch.rand(1, length, HEADS)
    forms: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "softmax": (_softmax, [x.transpose(1, 2).contiguous() for x in (q, k, v)]),
        "none": (lambda q, k, v: linear_attention(q, k, v), [q, k, v]),
        "scalar": (lambda q, k, v, g: linear_attention(q, k, v, decay=g), [q, k, v, scalar]),
        "vector": (lambda q, k, v, g: linear_attention(q, k, v, decay=g), [q, k, v, vector]),
        "delta": (lambda q, k, v, b: linear_attention(q, k, v, beta=b), [q, k, v, beta]),
        "gated delta": (
            lambda q, k, v, g, b: linear_attention(q, k, v, decay=g, beta=b),
            [q, k, v, scalar, beta],
        ),
        "dplr": (
            lambda q, k, v, a, b, g: dplr_attention(q, k, v, a, b, decay=g),
            [q, k, v, -k, k * beta.unsqueeze(-1), vector],
        ),
        "window 512": (lambda q, k, v: sliding_window_attention(q, k, v, window=512, sinks=4), [q, k, v]),
    }
    return forms[name]


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def _scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return selective_scan(x, dt, a, b, c)


def _scan_inputs(length: int) -> list[Tensor]:
    torch.manual_seed(0)
    x, dt = torch.randn(1, length, CHANNELS), torch.rand(1, length, CHANNELS)
    b, c = (torch.randn(1, length, COLUMNS) for _ in range(2))
    return [x, dt, -torch.rand(CHANNELS, COLUMNS), b, c]


def _step(form: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Step:
    """Forward + backward from fresh gradients, with an incoming gradient of ones that is made beforehand."""
    leaves = [t.requires_grad_() for t in tensors]
    with torch.no_grad():
        grad = torch.ones_like(form(*leaves))

    def step() -> None:
        torch.autograd.grad(form(*leaves), leaves, grad)

    return step


def _alternate(steps: dict[str, Step], rounds: int, clock: Clock) -> dict[str, float]:
    """The least time of each step in ms, the steps taking turns."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            start = clock()
            step()
            best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def _compiled(form: Any) -> Callable[..., Tensor]:
    whole: Callable[..., Tensor] = torch.compile(form, fullgraph=True)
    return whole


def _times(length: int, rounds: int, names: Sequence[str], clock: Clock) -> None:
    steps = {"softmax": _step(*_inputs("softmax", length))} if length <= 16384 else {}
    for name in names:
        form, tensors = _inputs(name, length)
        steps[name] = _step(form, tensors)
        if name != "window 512":
            steps[f"{name}, compiled"] = _step(_compiled(form), tensors)
    for step in steps.values():
        step()
    best = _alternate(steps, rounds, clock)
    for name, ms in best.items():
        ratio = f"{best['softmax'] / ms:8.1f}" if "softmax" in best else f"{'-':>8}"
        print(f"{length:7} {name:24} {ms:10.1f} {1e3 * ms / length:10.2f} {ratio}", flush=True)


def _scan_times(length: int, rounds: int, clock: Clock) -> None:
    tensors = _scan_inputs(length)
    steps = {
        "selective scan": _step(_scan, tensors),
        "its token loop": _step(lambda x, dt, a, b, c: token_loop(x, dt, a, b, c, None)[0], tensors),
    }
    steps["selective scan"]()
    best = _alternate(steps, rounds, clock)
    for name, ms in best.items():
        ratio = best["its token loop"] / ms
        print(f"{length:7} {name:24} {ms:10.1f} {1e3 * ms / length:10.2f} {ratio:8.1f}", flush=True)


def _peak(name: str, length: int) -> None:
    """Print the peak of one eager step over what the inputs, outputs and all their gradients take."""
    scan = name == "selective scan"
    form, tensors = (_scan, _scan_inputs(length)) if scan else _inputs(name, length)
    warm_form, warm = (_scan, _scan_inputs(600)) if scan else _inputs(name, 600)
    _step(warm_form, warm)()
    held = sum(t.nbytes for t in tensors)
    base = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])
    leaves = [t.requires_grad_() for t in tensors]
    out = form(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base + held
    counted = held + out.nbytes
    print(f"{length:7} {name:24} {peak / 2**20:8.0f} MiB  {peak / counted:5.2f} x (inputs + outputs)", flush=True)
    del grads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--classes", nargs="+", default=CLASSES, choices=CLASSES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-scan", action="store_true", help="leave the selective scan and its token loop out")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time instead of wall time: with one thread, right on a busy machine",
    )
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times")
    parser.add_argument("--peak-of", nargs=2, metavar=("CLASS", "LENGTH"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.peak_of:
        _peak(given.peak_of[0], int(given.peak_of[1]))
        return
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, {given.threads} threads")
    clock = time.process_time if given.cpu_time else time.perf_counter
    if given.memory:
        for name in [*given.classes, "selective scan"]:
            for length in given.lengths:
                subprocess.run([sys.executable, "-m", "mstc.kernels.bench", "--peak-of", name, str(length)], check=True)
        return
    print(f"{'T':>7} {'':24} {'ms':>10} {'us/token':>10} {'ratio':>8}   (ratio: to softmax, or to the token loop)")
    for length in given.lengths:
        _times(length, given.rounds, given.classes, clock)
    if not given.no_scan:
        _scan_times(4096, min(given.rounds, 2), clock)


if __name__ == "__main__":
    main()
