"""Starts a worker per job, one after another, and hands on what it says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from mstc.cli.bench.job import Event, Job, Result
from mstc.errors import MstcError

__all__ = ["Caches", "WorkerError", "run_job", "run_module", "worker_environment"]

_MMAP_THRESHOLD = "1048576"  # bytes; larger blocks go back to the system when they are freed


class WorkerError(MstcError):
    """A worker ended without a result; the message is the end of what it printed."""


Caches = Literal["kept", "empty", "off"]


def run_job(job: Job, on_step: Callable[[Event], None] = lambda event: None, *, caches: Caches = "kept") -> Result:
    """Measure ``job`` in a process of its own.

    caches: "kept" compiles with the caches of earlier runs, "empty" with new ones as on a fresh
    machine, "off" with none, so that not even one graph's kernels serve another.

    Raises `WorkerError` when the process fails or is killed (as the system does when memory runs out).
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output, tempfile.TemporaryDirectory() as cache:
        receive, send = os.pipe()
        command = [sys.executable, "-m", "mstc.cli.bench.worker", job.to_json(), str(send)]
        environment = worker_environment(caches, cache)
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


def run_module(module: str, job: Mapping[str, Any]) -> Any:
    """What ``python -m module JOB FILE`` writes to FILE, as JSON, in a process of its own.

    Raises `WorkerError` with the last line that it printed where it fails.
    """
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        written = Path(folder) / "result.json"
        command = [sys.executable, "-m", module, json.dumps(job), str(written)]
        status = subprocess.run(command, env=worker_environment("kept"), stdout=output, stderr=output).returncode
        if status != 0:
            raise WorkerError(_reason(status, output))
        return json.loads(written.read_text(encoding="utf-8"))


def _listen(lines: IO[str], on_step: Callable[[Event], None]) -> Result | None:
    for line in lines:
        record: dict[str, Any] = json.loads(line)
        if record.pop("kind") == "Result":
            record["timeline"] = [(seconds, use) for seconds, use in record["timeline"]]
            return Result(**record)
        on_step(Event(**record))
    return None


def worker_environment(caches: Caches, folder: str = "") -> dict[str, str]:
    """The environment of a measured process; ``folder`` holds its caches unless those of earlier runs are "kept"."""
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": _MMAP_THRESHOLD,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if caches != "kept":
        environment["TORCHINDUCTOR_CACHE_DIR"] = folder
    if caches == "off":
        environment["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    return environment


def _reason(status: int, output: IO[str]) -> str:
    output.seek(0)
    printed = [line.strip() for line in output.read().splitlines() if line.strip()]
    if status < 0:
        return f"killed by signal {-status}" + (", most likely for want of memory" if status == -9 else "")
    return next((line for line in reversed(printed) if "Error" in line), printed[-1] if printed else "no result")
