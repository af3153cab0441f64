"""What a measured model is told beside its tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from mstc.cli.bench.models import MODELS, build_model


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_batches_are_told_to_the_trunk(kind: Literal["padded", "packed"]) -> None:
    ids = torch.randint(0, 256, (2, 1100), generator=torch.Generator().manual_seed(0))
    at = torch.arange(1100).expand(2, 1100)
    told = {"attention_mask": (at >= 512).long()} if kind == "padded" else {"position_ids": at % 1024}
    losses = []
    for size in (MODELS["llama-tiny"], replace(MODELS["llama-tiny"], batch=kind)):
        torch.manual_seed(0)
        model = build_model(size)
        losses.append([model(input_ids=ids, labels=ids, **more).loss.item() for more in ({}, told)])
    assert losses[1][0] == losses[0][1] != losses[0][0]
