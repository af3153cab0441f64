"""Starts a worker per job, one after another, and hands on what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Any

from mstc.cli.bench.job import Event, Job, Result
from mstc.errors import MstcError

__all__ = ["WorkerError", "run_job"]

_MMAP_THRESHOLD = "1048576"  # bytes; larger blocks go back to the system when they are freed


class WorkerError(MstcError):
    """A worker ended without a result; the message is the end of what it printed."""


def run_job(job: Job, on_step: Callable[[Event], None] = lambda event: None, *, cold: bool = False) -> Result:
    """Measure ``job`` in a process of its own; ``cold`` compiles without any cache.

    Raises `WorkerError` when the process fails or is killed (as the system does when memory runs out).
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output, tempfile.TemporaryDirectory() as cache:
        receive, send = os.pipe()
        command = [sys.executable, "-m", "mstc.cli.bench.worker", job.to_json(), str(send)]
        environment = _environment(cache if cold else None)
        with os.fdopen(receive, encoding="utf-8") as lines:
            try:
                process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, pass_fds=[send])
            finally:
                os.close(send)
            try:
                result = _listen(lines, on_step)
                status = process.wait()
            finally:
                process.kill()
                process.wait()
        if result is None or status != 0:
            raise WorkerError(f"{job.system} at {job.seq} tokens: {_reason(status, output)}")
        return result


def _listen(lines: IO[str], on_step: Callable[[Event], None]) -> Result | None:
    for line in lines:
        record: dict[str, Any] = json.loads(line)
        if record.pop("kind") == "Result":
            record["timeline"] = [(seconds, use) for seconds, use in record["timeline"]]
            return Result(**record)
        on_step(Event(**record))
    return None


def _environment(cold_cache: str | None) -> dict[str, str]:
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": _MMAP_THRESHOLD,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if cold_cache is not None:
        environment |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_CACHE_DIR": cold_cache}
    return environment


def _reason(status: int, output: IO[str]) -> str:
    output.seek(0)
    printed = [line.strip() for line in output.read().splitlines() if line.strip()]
    if status < 0:
        return f"killed by signal {-status}" + (", most likely for want of memory" if status == -9 else "")
    return next((line for line in reversed(printed) if "Error" in line), printed[-1] if printed else "no result")
