"""What an eager step makes, looked up or derived."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BloomConfig, LlamaConfig

from mstc.cli.plan import tracker
from mstc.cli.plan.optimizers import OPTIMIZERS
from mstc.cli.plan.peers import SYSTEMS, Peer
from mstc.cli.plan.setting import Setting
from mstc.plan.devices import device

SETTING = Setting(device("a100-80g"), 2, torch.bfloat16, OPTIMIZERS["adamw-bf16"])
CONFIGS = {
    "llama": LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
                         num_hidden_layers=3, vocab_size=100),
    "bloom": BloomConfig(hidden_size=32, n_head=2, n_layer=3, vocab_size=100),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("system", list(SYSTEMS))
def test_what_is_looked_up_is_what_ops_make(system: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(system, CONFIGS[name], SETTING)
    looked_up = peer._run(64)
    assert len(looked_up._repeated) > 10
    monkeypatch.setattr(tracker, "_key", lambda *op: None)
    derived = peer._run(64)
    assert not derived._repeated
    assert derived.events == looked_up.events
    assert derived.seconds == pytest.approx(looked_up.seconds)


def _events(x: torch.Tensor, function: Any) -> list[tuple[int, int]]:
    """Of two runs of a function that reads x."""
    with tracker.Tracker(device("a100-80g"), "float32") as seen:
        seen.know(x)
        for _ in range(2):
            function()
        seen.close()
    events: list[tuple[int, int]] = seen.events
    return events


def test_sizes_and_kinds_of_operands_are_told_apart() -> None:
    x = torch.ones(4, 6, device="meta")
    assert [size for _, size in _events(x, lambda: (x + 1, x.t() + 1, x.long() + 1, x.double() + 1)) if size] == [
        *[96, 96, 192, 192, 192, 192] * 2
    ]


def test_views_and_writes_make_nothing() -> None:
    x = torch.ones(4, 6, device="meta")
    assert _events(x, lambda: (x.t(), x[1:], x.add_(1), x.view(24))) == []
