"""Runs a function in several processes joined by gloo."""

from __future__ import annotations

import faulthandler
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 600.0  # after which a rank that waits for ever says where, and ends


def run_workers(fn: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """``fn(rank, *args)`` on each rank; what each returned, by rank. A failing rank's error is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_work, (fn, world, folder, args), nprocs=world)  # type: ignore[no-untyped-call]
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(rank: int, fn: Callable[..., Any], world: int, folder: str, args: tuple[Any, ...]) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    try:
        torch.save(fn(rank, *args), Path(folder) / f"{rank}.pt")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        faulthandler.cancel_dump_traceback_later()
