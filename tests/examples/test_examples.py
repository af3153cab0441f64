"""Every example runs, learns, and runs in loops."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = sorted(p.stem for p in (ROOT / "examples").glob("*.py") if p.stem != "common")
PARALLEL = {"ddp", "fsdp2"}
# Two loops per layer and one of the head; under FSDP2 all layers are one compiled graph.
LOOPS = {"fsdp2": 3}


@pytest.mark.slow
@pytest.mark.inductor
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if name in PARALLEL else []
    command = [sys.executable, *start, str(ROOT / "examples" / f"{name}.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"loss(?: |': '?)([0-9.]+)", done.stdout)]
    assert len(losses) >= 3 and losses[-1] < losses[0], done.stdout
    loops = [int(x) for x in re.findall(r"graph \d+: (\d+) loops", done.stdout)]
    assert sum(loops) >= LOOPS.get(name, 4), done.stdout
