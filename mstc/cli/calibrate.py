"""``mstc calibrate``: measure this machine for the cost model, in about a minute."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import click
import torch
from torch import nn
from torch.nn import functional as F

from mstc.cli.arguments import device as device_argument
from mstc.cli.console import make_console, make_progress, make_table
from mstc.cli.plan.draft import capture
from mstc.ops import products
from mstc.ops.pages import empty_strided
from mstc.plan.devices import Device, local, store, stored

__all__ = ["calibrate"]

MIB = 2**20
ROWS = (32, 128, 512, 2048)
WIDTH = 1024
LOOP_TOKENS = 8192
LOOP_CHUNKS = (8, 64)


@dataclass
class Measured:
    """Seconds of each piece of work, by name, and what the fit makes of them."""

    kind: str
    seconds_each: float
    flops: dict[str, dict[int, float]] = field(default_factory=dict)
    attention: float = 0.0
    bandwidth: float = 0.0
    link: float = 0.0
    launch: float = 0.0
    collective: float | None = None


@click.command()
@click.option(
    "--device",
    "kind",
    callback=device_argument,
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
)
@click.option("--seconds", type=click.FloatRange(0.01), default=3.0, show_default=True, help="For each measurement.")
def calibrate(kind: str, seconds: float) -> None:
    """Measure matrix products, copies, attention, launches and transfers (collectives under torchrun); store them."""
    measured = Measured(kind, seconds)
    work = list(_work(measured))
    with make_progress(make_console(stderr=True)) as progress:
        task = progress.add_task("", total=len(work))
        for name, measure in work:
            progress.update(task, description=name)
            measure()
            progress.advance(task)
    found = fitted(measured)
    if int(os.environ.get("RANK", "0")) == 0:
        store(found)
        _print(found, measured)


def fitted(m: Measured) -> Device:
    """The device that the cost model reads: the most FLOPs reached by dtype, and the rows at half of that."""
    best = {dtype: max(by_rows.values()) for dtype, by_rows in m.flops.items()}
    main = "bfloat16" if m.kind == "cuda" else "float32"
    halves = [rows * (best[main] / rate - 1) for rows, rate in m.flops[main].items() if rows < ROWS[-1]]
    memory = (
        torch.cuda.get_device_properties(0).total_memory
        if m.kind == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    label = torch.cuda.get_device_name() if m.kind == "cuda" else _cpu()
    sources = {"all figures": "mstc calibrate on this machine"}
    if m.collective is not None:
        sources["all-reduce"] = f"{m.collective / 1e9:.2f} GB/s"
    return Device(
        name=m.kind,
        label=label,
        memory=memory,
        flops=best,
        bandwidth=m.bandwidth,
        link=m.link,
        reached=1.0,
        attention=min(m.attention / best[main], 1.0),
        copies=1.0,
        half_rows=max(statistics.median(halves), 0.0),
        launch=m.launch,
        sources=sources,
    )


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"this CPU, {threads} thread{'s' * (threads > 1)}"


def _work(m: Measured) -> Iterator[tuple[str, Callable[[], None]]]:
    """Each measurement by name."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows in ROWS:
            yield f"matrix product, {str(dtype)[6:]}, {rows} rows", partial(_product, m, dtype, rows)
    yield "attention", partial(_attention, m)
    yield "copy", partial(_copy, m)
    yield "launch", partial(_launch, m)
    yield "transfer", partial(_transfer, m)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield "all-reduce", partial(_collective, m)


def _product(m: Measured, dtype: torch.dtype, rows: int) -> None:
    """As loops multiply, into a buffer that they have."""
    x, w = (torch.randn(n, WIDTH, device=m.kind).to(dtype) for n in (rows, 4 * WIDTH))
    out = x.new_empty(rows, 4 * WIDTH)
    seconds = _timed(m, lambda: products.mm(x, w.t(), out=out))
    m.flops.setdefault(str(dtype)[6:], {})[rows] = 2.0 * rows * WIDTH * 4 * WIDTH / seconds


def _attention(m: Measured) -> None:
    dtype = torch.bfloat16 if m.kind == "cuda" else torch.float32
    q = torch.randn(1, 8, 2048, 64, device=m.kind).to(dtype)
    seconds = _timed(m, lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    m.attention = 4.0 * q.numel() * q.shape[2] / 2 / seconds


def _copy(m: Measured) -> None:
    x = torch.empty(64 * MIB, dtype=torch.uint8, device=m.kind)
    y = torch.empty_like(x)
    m.bandwidth = 2.0 * x.numel() / _timed(m, lambda: y.copy_(x))


def _launch(m: Measured) -> None:
    """Seconds per kernel of a loop: what many chunks take beyond few, by the kernels that they launch beyond them.

    What a chunk costs besides its work is not a kernel's launch alone, but reading, writing and adding its pieces.
    """
    mlp = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64)).to(m.kind)
    x = torch.randn(1, LOOP_TOKENS, 64, device=m.kind, requires_grad=True)
    call = next(c for c in capture(mlp, [x], local(m.kind)).step.calls if c.program is not None)
    few, many = (_loop(m, mlp, x, chunks) for chunks in LOOP_CHUNKS)
    few_kernels, many_kernels = (sum(call.in_chunks(chunks).cost.kernels) for chunks in LOOP_CHUNKS)
    m.launch = max(many - few, 0.0) / (many_kernels - few_kernels)


def _loop(m: Measured, mlp: nn.Module, x: torch.Tensor, chunks: int) -> float:
    """Seconds of a small MLP in chunks, forward and backward."""
    options: dict[str, Any] = {"mini_sequence": {"chunk_tokens": x.shape[1] // chunks}}
    loop = torch.compile(mlp, backend="mstc", options=options, dynamic=False)
    return _timed(m, lambda: loop(x).sum().backward())


def _transfer(m: Measured) -> None:
    """Between device and host; on a CPU, to memory that is new each time."""
    if m.kind == "cuda":
        host = torch.empty(64 * MIB, dtype=torch.uint8, pin_memory=True)
        there = host.cuda()
        m.link = host.numel() / _timed(m, lambda: there.copy_(host, non_blocking=True))
    else:
        x = torch.ones(64 * MIB, dtype=torch.uint8)
        m.link = x.numel() / _timed(m, lambda: empty_strided(x.shape, x.stride(), x.dtype).copy_(x))


def _collective(m: Measured) -> None:
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("nccl" if m.kind == "cuda" else "gloo")
    x = torch.ones(4 * MIB, device=m.kind)
    m.collective = x.numel() * 4 / _timed(m, lambda: dist.all_reduce(x), fixed=5)


def _timed(m: Measured, work: Callable[[], Any], fixed: int | None = None) -> float:
    """The median seconds of a call, over the time given; ``fixed`` calls where all ranks must agree."""
    work()
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 3 or (fixed is None and time.perf_counter() - started < m.seconds_each):
        before = time.perf_counter()
        work()
        if m.kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - before)
        if fixed is not None and len(times) == fixed:
            break
    return statistics.median(times)


def _print(found: Device, m: Measured) -> None:
    table = make_table(found.label, "what", "measured")
    for dtype, by_rows in m.flops.items():
        for rows, rate in by_rows.items():
            table.add_row(f"matrix product, {dtype}, {rows} rows", f"{rate / 1e9:.1f} GFLOP/s")
    table.add_row("attention", f"{m.attention / 1e9:.1f} GFLOP/s")
    table.add_row("copy (read and write)", f"{m.bandwidth / 1e9:.1f} GB/s")
    table.add_row("transfer", f"{m.link / 1e9:.1f} GB/s")
    table.add_row("launch", f"{m.launch * 1e6:.1f} us")
    if m.collective is not None:
        table.add_row("all-reduce", f"{m.collective / 1e9:.2f} GB/s")
    console = make_console()
    console.print(table)
    console.print(f"stored in {stored()}", markup=False, soft_wrap=True)
