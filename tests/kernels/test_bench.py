"""The benchmark's commands, on sizes that take no time: what they print and write, not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mstc.kernels import bench
from mstc.kernels.bench_cases import CLASSES, SCAN, Sizes, indexed_loop, scan_inputs, token_loop


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str) -> list[dict[str, object]]:
    """Rows that the command wrote."""
    path, threads = tmp_path / "bench.json", torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["bench", "--threads", "1", "--rounds", "1", "--json", str(path), *arguments])
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)
    rows: list[dict[str, object]] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU this measures for minutes: `make gpu`")
def test_without_a_gpu_nothing_is_called_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run(monkeypatch, tmp_path, "--gpu", "--lengths", "64")
    assert "no GPU here: nothing is measured" in capsys.readouterr().out
    assert [row["system"] for row in rows[::2]] == ["softmax", *CLASSES, SCAN]
    assert {row["direction"] for row in rows} == {"forward", "forward + backward"}
    assert not any(row["measured"] or row["ms"] for row in rows)


def test_time_per_token_and_how_flat_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "_compiled", lambda form: form)
    rows = run(monkeypatch, tmp_path, "--flat", "--lengths", "64", "128", "--classes", "scalar")
    systems = ["scalar", "scalar, compiled", SCAN, f"{SCAN}, compiled"]
    assert [(row["tokens"], row["system"]) for row in rows] == [(t, s) for t in (64, 128) for s in systems]
    assert all(row["us_per_token"] == pytest.approx(1e3 * row["ms"] / row["tokens"]) for row in rows)  # type: ignore[operator]
    assert "greatest / least" in capsys.readouterr().out


def test_peak_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (row,) = run(monkeypatch, tmp_path, "--memory", "--lengths", "4096", "--classes", "scalar", "--no-scan")
    assert (row["system"], row["tokens"]) == ("scalar", 4096)
    assert 1 < float(str(row["multiple"])) < 20


def test_both_loops_are_the_scan() -> None:
    tensors = [t.double() for t in scan_inputs(Sizes(20, batch=2, channels=6, columns=3))]
    torch.testing.assert_close(indexed_loop(*tensors), token_loop(*tensors))


def test_a_submodule_does_not_hide_the_name_that_it_shares() -> None:
    code = "import mstc.kernels.selective_scan.op; from mstc.kernels import selective_scan as s; assert callable(s)"
    subprocess.run([sys.executable, "-c", code], check=True)
