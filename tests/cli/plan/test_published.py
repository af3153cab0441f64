"""Published lengths of Llama3-8B on one GPU of 80 GB, in thousands of 1024 tokens, beside what is predicted."""

from __future__ import annotations

import pytest
import torch

from mstc.cli.plan.models import target_of
from mstc.cli.plan.optimizers import OPTIMIZERS
from mstc.cli.plan.peers import Peer
from mstc.cli.plan.setting import Setting
from mstc.plan.devices import device

PUBLISHED = {"plain": 5 * 1024, "checkpointing": 14 * 1024, "mini-sequence": 60 * 1024}


def _peer(system: str) -> tuple[Peer, int]:
    a100 = device("a100-80g")
    setting = Setting(a100, 1, torch.bfloat16, OPTIMIZERS["adamw-bf16-in-backward"])
    return Peer(system, target_of("llama3-8b").config, setting), a100.usable()


@pytest.mark.parametrize("system", ["checkpointing", "mini-sequence"])
def test_the_longest_is_within_15_percent(system: str) -> None:
    peer, budget = _peer(system)
    assert peer.usage(int(0.85 * PUBLISHED[system])).fits_in_blocks(budget)
    assert not peer.usage(int(1.15 * PUBLISHED[system])).fits_in_blocks(budget)


@pytest.mark.parametrize("system", list(PUBLISHED))
def test_the_published_length_fills_the_device(system: str) -> None:
    """Within a tenth of what the device has (plain training: a tenth too much, for which no reason was found)."""
    peer, budget = _peer(system)
    assert 0.9 * budget < peer.usage(PUBLISHED[system]).peak < 1.1 * budget
