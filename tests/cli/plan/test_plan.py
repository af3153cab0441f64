"""``mstc plan`` and ``mstc calibrate`` from the outside: figures, and one clear line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mstc.cli.main import main
from mstc.cli.plan.models import target_of
from mstc.errors import PlanError

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


def _written(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return _written(tmp_path, _TINY)


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
    swept = found["sweep"]
    chunk_peaks = [row["peak"] for row in swept["rows"]]
    assert chunk_peaks[0] == max(chunk_peaks)
    assert swept["rows"][swept["best"]]["seconds"] == min(row["seconds"] for row in swept["rows"])
    assert {row["measured_seconds"] for row in swept["rows"]} == {None}
    assert any("FlashAttention-2" in line for line in found["assumptions"])


@pytest.mark.parametrize(
    ("model", "device", "says"),
    [
        ("llama9", "a100-80g", "unknown model 'llama9'"),
        ("llama3-8b", "a1000", "unknown device 'a1000'"),
        ("llama3-8b", "this", "run `mstc calibrate` first"),
        ("nowhere.py:step", "a100-80g", "no file nowhere.py"),
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


_FILE = """
import torch
from torch import nn

def build(seq):
    model = nn.Sequential(nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64))
    return lambda x: model(x).square().mean(), torch.zeros(1, seq, 64)

def narrow(seq):
    model = nn.Linear(3, 4)
    return lambda x: model(x).sum(), torch.zeros(seq, 5)

def broken(seq):
    def fn(x):
        y = x.sum()
        torch._dynamo.graph_break()
        return y * 2
    return fn, torch.zeros(seq, 5, requires_grad=True)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "steps.py"
    path.write_text(_FILE, encoding="utf-8")
    return path


def test_a_function_is_planned(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same function that `mstc dump` takes; its parameters and their dtype are its own."""
    assert _run("plan", "--model", f"{file}:build", "--device", "a100-80g", "--seq", "8192", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["peak_by_category"]["parameters"] == 4 * (2 * 64 * 128 + 128 + 64)
    assert found["peak_by_category"]["optimizer state"] == 4 * (2 * 64 * 128 + 128 + 64)
    assert "as FUNCTION makes them" in found["assumptions"][0]


@pytest.mark.parametrize(
    ("function", "more", "says"),
    [
        ("absent", [], "has no function 'absent'"),
        ("narrow", [], "narrow: the function raised RuntimeError: a and b must have same reduction dim"),
        ("broken", [], "captured in 2 graphs; plan a function that is one graph"),
        ("build", ["--dtype", "float32"], "--batch and --dtype are of configurations"),
    ],
)
def test_a_function_that_cannot_be_planned(
    function: str, more: list[str], says: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("plan", "--model", f"{file}:{function}", "--device", "a100-80g", *more) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_unknown_keys_of_a_configuration_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _written(tmp_path, {**_TINY, "hiden_size": 3})
    assert _run("plan", "--model", str(path), "--device", "a100-80g") == 2
    assert "unknown keys hiden_size for a llama configuration" in capsys.readouterr().err


def test_unknown_keys_are_left_out_on_demand(tmp_path: Path) -> None:
    path = _written(tmp_path, {**_TINY, "num_nextn_predict_layers": 1})
    with pytest.raises(PlanError, match="unknown keys num_nextn_predict_layers .* --ignore-unknown"):
        target_of(str(path))
    assert target_of(str(path), ignore_unknown=True).config.hidden_size == 64


def test_unknown_keys_of_a_part_are_named(tmp_path: Path) -> None:
    settings = {"model_type": "llava", "text_config": {**_TINY, "hiden_size": 3}}
    path = _written(tmp_path, settings)
    with pytest.raises(PlanError, match="text_config: unknown keys hiden_size for a llama configuration"):
        target_of(str(path))


def test_no_sequence_is_longer_than_its_learned_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As GPT-2 is published, of whose loss transformers would warn, which ends graphs."""
    settings = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 100, "n_ctx": 1024}
    path = _written(tmp_path, {**settings, "architectures": ["GPT2LMHeadModel"]})
    wanted = ["plan", "--model", str(path), "--device", "a100-80g"]
    assert _run(*wanted, "--seq", "1025") == 2
    assert "learned positions for 1024 tokens, but --seq is 1025" in capsys.readouterr().err
    assert _run(*wanted, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["longest"] for row in found["systems"]} == {1024}
    assert any("1024 learned positions" in line for line in found["assumptions"])


@pytest.mark.slow
def test_an_encoder_decoder_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its layers stand in two lists, of equal numbers; Mini-Sequence's code has no head for it."""
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 100}
    settings = {"model_type": "t5", **sizes, "decoder_start_token_id": 0, "n_positions": 512, "dropout_rate": 0.0}
    path = _written(tmp_path, settings)
    assert _run("plan", "--model", str(path), "--device", "a100-80g", "--seq", "4096", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    peaks = {row["system"]: row["peak"] for row in found["systems"]}
    assert list(peaks) == ["plain", "checkpointing", "mstc", "mstc, offloading"]
    assert peaks["mstc"] < peaks["plain"]


def test_a_published_configuration_is_understood(tmp_path: Path) -> None:
    """Older keys and those that say nothing of the model's sizes are no mistakes."""
    older = {"rope_theta": 500000, "rope_scaling": None, "torch_dtype": "bfloat16", "auto_map": {}, "made_by": "me"}
    path = _written(tmp_path, {**_TINY, **older})
    assert target_of(str(path)).config.rope_parameters["rope_theta"] == 500000


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [("config.json", "[]", "must hold a model's configuration"), ("step.py", "def f(seq): ...", "step.py:FUNCTION")],
)
def test_files_that_are_no_configuration(name: str, text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=says):
        target_of(str(tmp_path / name))


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
