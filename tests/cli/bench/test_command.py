"""`mstc bench` from end to end on a tiny model, and what happens when a worker fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mstc.cli.bench import command
from mstc.cli.bench.driver import WorkerError, run_job
from mstc.cli.bench.job import Event, Job, Result
from mstc.cli.bench.worker import measure
from mstc.cli.main import main

TINY = Job(system="eager", model="llama-tiny", seq=64, steps=2)


def test_measure_reports_every_step() -> None:
    events: list[Event] = []
    result = measure(TINY, events.append)
    assert [event.step for event in events] == [0, 1, 2]
    assert [event.loss for event in events] == result.losses
    assert len(result.step_s) == 2 and result.tokens == 64 and result.grad_norm > 0
    assert result.losses[0] == result.losses[2]  # without an optimizer each step is the same work


def test_an_optimizer_learns() -> None:
    result = measure(Job(system="eager", model="llama-tiny", seq=64, steps=8, text=True, learning_rate=1e-2))
    assert result.losses[-1] < result.losses[0] - 0.5


def test_a_worker_process_sends_its_steps_and_result() -> None:
    events: list[Event] = []
    result = run_job(TINY, events.append)
    assert [event.step for event in events] == [0, 1, 2]
    assert result.losses == pytest.approx(measure(TINY).losses)


def test_a_failing_worker_says_why() -> None:
    with pytest.raises(WorkerError, match="eager at 64 tokens: KeyError: 'no such model'"):
        run_job(Job(system="eager", model="no such model", seq=64, steps=1))


def fake_run_job(job: Job, on_step: object, *, caches: str) -> Result:
    if job.system == "ckpt":
        raise WorkerError("ckpt at 64 tokens: killed by signal 9")
    seconds = 1.0 if job.system == "mstc" else 2.0
    return Result(job.system, job.seq, job.seq, [seconds], 9.0, 10.0, 5.0, [5.0, 5.0], 1.0, [])


def test_bench_alternates_and_writes_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[str] = []

    def spy(job: Job, on_step: object, *, caches: str) -> Result:
        order.append(job.system)
        return fake_run_job(job, on_step, caches=caches)

    monkeypatch.setattr(command, "run_job", spy)
    out = tmp_path / "new" / "bench.json"
    args = ["bench", "--systems", "eager,mstc", "--rounds", "2", "--seq", "64", "--out", str(out)]
    result = CliRunner().invoke(main, [*args, "--options", '{"lm_head": false}'])
    assert result.exit_code == 0, result.stderr
    assert order == ["eager", "mstc"] * 2
    data = json.loads(out.read_text(encoding="utf-8"))
    assert [row["system"] for row in data["rows"]] == ["eager", "mstc"]
    assert data["ratios"][0]["baseline"] == "eager" and data["ratios"][0]["step"] == 0.5
    assert [job["options"] for job in data["jobs"]] == [{}, {"lm_head": False}]
    assert "mstc over" in result.stdout


def test_bench_goes_on_after_a_failure_and_ends_with_status_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "run_job", fake_run_job)
    out = tmp_path / "bench.json"
    result = CliRunner().invoke(main, ["bench", "--systems", "ckpt,eager", "--seq", "64", "--out", str(out)])
    assert result.exit_code == 1
    assert "failed: ckpt at 64 tokens: killed by signal 9" in result.stdout
    data = json.loads(out.read_text(encoding="utf-8"))
    assert [row["system"] for row in data["rows"]] == ["eager"]
    assert data["failures"][0]["system"] == "ckpt"


def test_what_failed_is_not_tried_at_greater_length(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[str, int]] = []

    def spy(job: Job, on_step: object, *, caches: str) -> Result:
        tried.append((job.system, job.seq))
        return fake_run_job(job, on_step, caches=caches)

    monkeypatch.setattr(command, "run_job", spy)
    result = CliRunner().invoke(main, ["bench", "--systems", "ckpt,mstc", "--seq", "64,128,256"])
    assert result.exit_code == 1
    assert tried == [("ckpt", 64), ("mstc", 64), ("mstc", 128), ("mstc", 256)]
    assert "failed: ckpt at 256 tokens: failed at 64, not tried" in result.stdout


@pytest.mark.parametrize("seq", ["64", "64,128"])
def test_bench_as_json_and_as_a_plot(seq: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "run_job", fake_run_job)
    picture = tmp_path / "new" / "bench.png"
    args = ["bench", "--systems", "eager,mstc", "--seq", seq, "--json", "--plot", str(picture)]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.stderr
    assert len(json.loads(result.stdout)["rows"]) == 2 * len(seq.split(","))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--out", "--plot"])
def test_where_nothing_can_be_written_nothing_is_run(option: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = CliRunner().invoke(main, ["bench", option, str(tmp_path / "file" / "bench.json")])
    assert result.exit_code == 2
    assert option in result.stderr and "cannot be made" in result.stderr and result.stderr.count("\n") == 1
