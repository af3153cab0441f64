"""On what a step is planned."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mstc.cli.plan.optimizers import Optimizer
from mstc.plan.devices import Device


@dataclass(frozen=True)
class Setting:
    """batch: sequences per step; dtype: of parameters and activations."""

    device: Device
    batch: int
    dtype: torch.dtype
    optimizer: Optimizer

    @property
    def precision(self) -> str:
        """The dtype's name, as devices know it."""
        return str(self.dtype).removeprefix("torch.")
