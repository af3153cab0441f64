"""Time and peak against the number of mini-sequences: predicted, and measured on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mstc.cli.main import main
from mstc.cli.plan.draft import Planned, plan_for
from mstc.cli.plan.models import Target
from mstc.cli.plan.optimizers import OPTIMIZERS
from mstc.cli.plan.setting import Setting
from mstc.cli.plan.sweep import SLOWER, SPARED, sweep_chunks
from mstc.plan.devices import Device, device, store
from testkit.hf_models import config_of

_FILE = """
import torch
from torch import nn

def build(seq):
    mlp = nn.Sequential(nn.Linear(64, 2048), nn.SiLU(), nn.Linear(2048, 64))
    return lambda x: (x + mlp(x)).square().mean(), torch.zeros(1, seq, 64)
"""


@pytest.fixture(scope="module")
def planned() -> Planned:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 3, "num_attention_heads": 8}
    config = config_of("llama", **sizes, num_key_value_heads=2, vocab_size=8192, max_position_embeddings=1 << 24)
    return plan_for(Target("tiny", config), Setting(device("h100-80g"), 1, torch.bfloat16, OPTIMIZERS["none"]))


def test_more_mini_sequences_hold_less_and_the_optimum_fits(planned: Planned) -> None:
    swept = sweep_chunks(planned, 65536)
    assert [row.chunks for row in swept.rows] == [2**i for i in range(10)]
    assert all(row.chunks * row.tokens == 65536 for row in swept.rows)
    peaks = [row.peak for row in swept.rows]
    assert peaks == sorted(peaks, reverse=True)
    assert swept.best is not None
    assert swept.rows[swept.best].seconds == min(row.seconds for row in swept.rows)


def test_the_length_from_which_chunks_pay(planned: Planned) -> None:
    """Beneath it no number of chunks spares enough in the time allowed; at it one does."""
    found = sweep_chunks(planned, 8192).pays_from
    assert found is not None

    def pay(tokens: int) -> bool:
        whole, *cut = sweep_chunks(planned, tokens).rows
        held = whole.peak - planned.resident
        return any(
            r.peak - planned.resident <= (1 - SPARED) * held and r.seconds <= (1 + SLOWER) * whole.seconds for r in cut
        )

    assert pay(found)
    assert not pay(found // 2)


@pytest.mark.inductor
def test_on_this_machine_each_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MSTC_CACHE_DIR", str(tmp_path))
    store(Device("cpu", "this CPU", 1 << 36, {"float32": 1e11}, 2e10, 2e9))
    file = tmp_path / "step.py"
    file.write_text(_FILE, encoding="utf-8")
    wanted = [
        "--model",
        f"{file}:build",
        "--device",
        "this",
        "--seq",
        "256",
        "--sweep",
        "chunks",
        "--optimizer",
        "none",
    ]
    with pytest.raises(SystemExit) as ended:
        main(["plan", *wanted, "--json", "--plot", str(tmp_path / "swept.png")])
    assert not ended.value.code
    swept = json.loads(capsys.readouterr().out)["sweep"]
    assert [row["chunks"] for row in swept["rows"]] == [1, 2]
    times = [row["measured_seconds"] for row in swept["rows"]]
    assert times[swept["best"]] == min(times) > 0
    assert all(row["measured_peak"] > 0 for row in swept["rows"])
    assert (tmp_path / "swept.png").stat().st_size > 10_000
