"""Times and memory of the kernels, each class beside softmax attention, the systems alternating in one run.

    python -m mstc.kernels.bench --threads 2 --lengths 2048 16384     times, and the selective scan beside its loops
    python -m mstc.kernels.bench --flat                               time per token from 4K to 64K
    python -m mstc.kernels.bench --memory                             peak memory of one step
    python -m mstc.kernels.bench --gpu                                on a GPU, beside flash attention and fla-core

On a CPU: B 1, H 8, K = V = 64, float32, forward + backward. A time is the least of the rounds. The selective scan
(D 512, N 16) stands beside two loops over its tokens: one that takes the tokens apart once, and one that indexes
them, as models without a kernel do; that one's time grows with T squared, so it is run at shorter lengths. Peak memory
is what a process of its own gains over its inputs, outputs and gradients held, as a multiple of inputs + outputs.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mstc.kernels import bench_gpu
from mstc.kernels.bench_cases import CLASSES, SCAN, Form, Sizes, Step, case, indexed_loop, make_step, token_loop

__all__ = ["main"]

FLAT = [4096, 8192, 16384, 32768, 65536]
LONGEST_SOFTMAX = 16384
LOOP_LENGTH = 4096
INDEXED_LENGTHS = [512, 1024]
Row = dict[str, Any]
Clock = Callable[[], float]
Advance = Callable[[str], None]


@contextmanager
def _progress(total: int) -> Iterator[Advance]:
    """A bar on stderr, where that is a terminal; what is given is named beside it and counts one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda name: progress.update(task, description=name, advance=1)


def _compiled(form: Form) -> Form:
    whole: Form = torch.compile(form, fullgraph=True)
    return whole


def _alternate(steps: dict[str, Step], rounds: int, clock: Clock, advance: Advance) -> dict[str, float]:
    """The least time of each step in ms, the steps taking turns."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            advance(name)
            start = clock()
            step()
            best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def _measure(tokens: int, steps: dict[str, Step], beside: str | None, rounds: int, clock: Clock) -> list[Row]:
    """Warm up, alternate, print a line per system; the ratio is to ``beside``."""
    with _progress(len(steps) * (rounds + 1)) as advance:
        for name, step in steps.items():
            if name != beside:
                advance(f"{name}: warming up")
                step()
        best = _alternate(steps, rounds, clock, advance)
    rows = []
    for name, ms in best.items():
        ratio = None if beside is None else best[beside] / ms
        rows.append({"system": name, "tokens": tokens, "ms": ms, "us_per_token": 1e3 * ms / tokens, "ratio": ratio})
        print(f"{tokens:7} {name:34} {ms:10.1f} {1e3 * ms / tokens:10.2f} {_or_dash(ratio):>8}", flush=True)
    return rows


def _or_dash(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.1f}"


def _steps(tokens: int, names: Sequence[str]) -> dict[str, Step]:
    """Each class, called eagerly and from compiled code."""
    steps = {}
    for name in names:
        form, tensors = case(name, Sizes(tokens))
        steps[name] = make_step(form, tensors)
        if name != "window 512":
            steps[f"{name}, compiled"] = make_step(_compiled(form), tensors)
    return steps


def _times(tokens: int, rounds: int, names: Sequence[str], clock: Clock) -> list[Row]:
    softmax = tokens <= LONGEST_SOFTMAX
    steps = {"softmax": make_step(*case("softmax", Sizes(tokens)))} if softmax else {}
    return _measure(tokens, {**steps, **_steps(tokens, names)}, "softmax" if softmax else None, rounds, clock)


def _scan_times(tokens: int, loop: Form, name: str, rounds: int, clock: Clock) -> list[Row]:
    steps = {name: make_step(loop, case(SCAN, Sizes(tokens))[1]), **_steps(tokens, [SCAN])}
    return _measure(tokens, steps, name, rounds, clock)


def _flat(lengths: Sequence[int], rounds: int, names: Sequence[str], clock: Clock) -> list[Row]:
    """Time per token at each length, and the greatest as a multiple of the least."""
    rows = []
    for tokens in lengths:
        rows += _measure(tokens, _steps(tokens, names), None, rounds, clock)
    print(f"\n{'us per token, greatest / least':42}")
    for name in dict.fromkeys(row["system"] for row in rows):
        each = [row["us_per_token"] for row in rows if row["system"] == name]
        print(f"{name:42} {max(each) / min(each):10.2f}")
    return rows


def _memory(lengths: Sequence[int], names: Sequence[str]) -> list[Row]:
    rows = []
    with _progress(len(lengths) * len(names)) as advance:
        for name in names:
            for tokens in lengths:
                advance(f"{name}, {tokens} tokens")
                command = [sys.executable, "-m", "mstc.kernels.bench", "--peak-of", name, str(tokens)]
                said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                row = json.loads(said.splitlines()[-1])
                rows.append(row)
                print(f"{tokens:7} {name:24} {row['peak_mb']:8.0f} MiB  {row['multiple']:5.2f} x (inputs + outputs)")
    return rows


def _peak(name: str, tokens: int) -> None:
    """Print the peak of one eager step over what the inputs, outputs and all their gradients take, as JSON."""
    form, tensors = case(name, Sizes(tokens))
    make_step(*case(name, Sizes(600)))()
    held = sum(t.nbytes for t in tensors)
    base = _resident("VmRSS")
    leaves = [t.requires_grad_() for t in tensors]
    out = form(*leaves)
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    peak = _resident("VmHWM") - base + held
    multiple = peak / (held + out.nbytes)
    print(json.dumps({"system": name, "tokens": tokens, "peak_mb": peak / 2**20, "multiple": multiple}))
    del grads


def _resident(key: str) -> int:
    """Bytes of this process in memory: now ("VmRSS"), or the most so far ("VmHWM"; `getrusage` would count those of the
    process that started it)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mstc.kernels.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens; the default depends on what is measured")
    parser.add_argument("--classes", nargs="+", default=CLASSES, choices=[*CLASSES, SCAN])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-scan", action="store_true", help="leave the selective scan and its token loops out")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU time instead of wall time: with one thread, right on a busy machine",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured there too")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--flat", action="store_true", help="time per token from 4K to 64K, without softmax")
    mode.add_argument("--memory", action="store_true", help="peak memory instead of times")
    mode.add_argument("--gpu", action="store_true", help="on a GPU; without one, a dry run on the CPU")
    mode.add_argument("--peak-of", nargs=2, metavar=("CLASS", "LENGTH"), help=argparse.SUPPRESS)
    return parser


def _run(given: argparse.Namespace) -> list[Row]:
    clock = time.process_time if given.cpu_time else time.perf_counter
    names = [n for n in given.classes if n != SCAN]
    if given.gpu:
        with _progress(bench_gpu.count(given.classes, given.lengths)) as advance:
            return bench_gpu.run(given.classes, given.lengths, given.rounds, advance)
    if given.memory:
        return _memory(given.lengths or [16384], names if given.no_scan else [*names, SCAN])
    print(f"{'T':>7} {'':34} {'ms':>10} {'us/token':>10} {'ratio':>8}   (ratio: to softmax, or to the loop)")
    if given.flat:
        return _flat(given.lengths or FLAT, given.rounds, names if given.no_scan else [*names, SCAN], clock)
    rows = []
    for tokens in given.lengths or [2048, 16384]:
        rows += _times(tokens, given.rounds, names, clock)
    if not given.no_scan:
        rows += _scan_times(LOOP_LENGTH, token_loop, "its token loop", min(given.rounds, 2), clock)
        for tokens in INDEXED_LENGTHS:
            rows += _scan_times(tokens, indexed_loop, "its token loop, indexing", 1, clock)
    return rows


def main() -> None:
    given = _parser().parse_args()
    torch.set_num_threads(given.threads)
    if given.peak_of:
        _peak(given.peak_of[0], int(given.peak_of[1]))
        return
    about = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": given.threads,
        "clock": "CPU time" if given.cpu_time else "wall time",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    rows = _run(given)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
