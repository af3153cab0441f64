"""What a real run leaves behind: ``options={"dump": folder}``, TORCH_LOGS and TORCH_TRACE."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed

import mstc
from mstc.dump import files
from testkit.dumps import OPTIONS
from testkit.tiny import Tiny, inputs, mean_loss, step

SCRIPT = """
import torch
from testkit.tiny import Tiny, inputs, mean_loss, step
from testkit.dumps import OPTIONS
torch.compile(step(Tiny(), mean_loss), backend="mstc", options=OPTIONS)(*inputs())
"""


def compiled(folder: Path | None) -> Any:
    options = OPTIONS | ({"dump": folder} if folder else {})
    return torch.compile(step(Tiny(), mean_loss), backend="mstc", options=options)


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, check=True)


def test_a_real_run_writes_the_page_and_adds_later_graphs(tmp_path: Path) -> None:
    fn = compiled(tmp_path)
    fn(*inputs()).backward()
    assert {p.name for p in tmp_path.iterdir()} == {
        "report.html",
        "report.txt",
        "report.json",
        "graphs.txt",
        "dump.json",
    }
    (graph,) = files.read(tmp_path).graphs
    assert graph.name.startswith("graph ") and graph.after.peak > 0
    assert [b.status for b in graph.blocks].count("loss") == 1
    torch.compile(step(Tiny(), mean_loss), backend="mstc", options={**OPTIONS, "dump": tmp_path}, dynamic=False)(
        *inputs(length=29)
    )
    assert len(files.read(tmp_path).graphs) == 2


@pytest.mark.inductor
def test_a_hit_of_the_compile_caches_writes_too(tmp_path: Path) -> None:
    for folder in (tmp_path / "cold", tmp_path / "warm"):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.compile(lambda x: (x @ x).sin().sum(), backend="mstc", options={"dump": folder})(torch.ones(8, 8))
    assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == 1
    cold, warm = (files.read(tmp_path / name).graphs[0] for name in ("cold", "warm"))
    assert [s.nodes for s in cold.stages] == [s.nodes for s in warm.stages]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    folder = tmp_path / "file" / "dump"
    with pytest.raises(BackendCompilerFailed, match="option 'dump' is .*, a folder that cannot be made.*give another"):
        torch.compile(torch.sin, backend="mstc", options={"dump": folder, "lower": "eager"})(torch.ones(3))


def test_any_report_can_be_saved(tmp_path: Path) -> None:
    mstc.clear_reports()
    compiled(None)(*inputs())
    (report,) = mstc.reports()
    report.save(tmp_path)
    (graph,) = files.read(tmp_path).graphs
    assert graph.stages == () and [b.label for b in graph.blocks] == [r.label for r in report.regions]
    assert "were not recorded" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_without_being_asked_nothing_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mstc.dump.observer.Recording", None)  # would fail when called
    compiled(None)(*inputs())
    assert list(tmp_path.iterdir()) == []


def test_torch_logs() -> None:
    said = run(TORCH_LOGS="+mstc").stderr
    for part in ("as captured", "after lm_head", "+loss_loop", "regions, "):
        assert part in said


def test_torch_trace(tmp_path: Path) -> None:
    assert "mini_sequence" not in run(TORCH_TRACE=str(tmp_path)).stderr
    text = "".join(p.read_text(encoding="utf-8") for p in tmp_path.iterdir())
    assert '"name": "mstc_blocks"' in text and '"name": "mstc_0_captured"' in text
    assert re.search(r'"name": "mstc_\d+_lm_head"', text)
