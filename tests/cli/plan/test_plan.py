"""``mstc plan`` and ``mstc calibrate`` from the outside: figures, and one clear line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mstc.cli.main import main

_TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def _run(*args: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(args))
    return int(ended.value.code or 0)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_TINY), encoding="utf-8")
    return path


def test_the_systems_stand_side_by_side(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["--model", str(config), "--device", "a100-80g", "--seq", "8192", "--sweep", "chunks", "--json"]
    assert _run("plan", *wanted) == 0
    found = json.loads(capsys.readouterr().out)
    peaks = {row["system"]: row["peak"] for row in found["systems"]}
    assert peaks["Mini-Sequence (published)"] < peaks["checkpointing"] <= peaks["plain"]
    assert found["what_if"][-1]["peak"] < peaks["Mini-Sequence (published)"]
    assert found["peak_by_category"]["parameters"] > 0
    times = [line["seconds"] for line in found["what_if"]]
    assert times == sorted(times)
    chunk_peaks = [line["peak"] for line in found["sweep"]]
    assert chunk_peaks[0] == max(chunk_peaks)
    assert any("FlashAttention-2" in line for line in found["assumptions"])


@pytest.mark.parametrize(
    ("model", "device", "says"),
    [
        ("llama9", "a100-80g", "unknown model 'llama9'"),
        ("llama3-8b", "a1000", "unknown device 'a1000'"),
        ("llama3-8b", "this", "run `mstc calibrate` first"),
        ("nowhere.py:step", "a100-80g", "nowhere.py does not exist"),
    ],
)
def test_bad_input_is_one_clear_line(
    model: str,
    device: str,
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MSTC_CACHE_DIR", str(tmp_path))
    assert _run("plan", "--model", model, "--device", device) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_unknown_keys_of_a_configuration_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**_TINY, "hiden_size": 3}), encoding="utf-8")
    assert _run("plan", "--model", str(path), "--device", "a100-80g") == 2
    assert "unknown keys hiden_size for a llama configuration" in capsys.readouterr().err


def test_calibration_is_stored_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mstc.plan.devices import device

    monkeypatch.setenv("MSTC_CACHE_DIR", str(tmp_path))
    assert _run("calibrate", "--device", "cpu", "--seconds", "0.01") == 0
    assert "GFLOP/s" in capsys.readouterr().out
    found = device("this")
    assert found.flops["float32"] > 1e8
    assert found.seconds(1e9, 0, 512, 1, "float32") < found.seconds(2e9, 0, 512, 1, "float32")
