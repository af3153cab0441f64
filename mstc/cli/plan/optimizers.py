"""What an optimizer holds beside parameters and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Optimizer:
    """state: bytes per parameter that rest between steps; step: bytes per parameter while it steps; in_backward:
    each gradient is applied and dropped as soon as it is there."""

    about: str
    state: float
    step: float
    in_backward: bool = False

    def state_bytes(self, parameters: Sequence[Tensor]) -> int:
        return int(self.state * sum(p.numel() for p in parameters))

    def step_bytes(self, parameters: Sequence[Tensor]) -> int:
        return int(self.step * sum(p.numel() for p in parameters))


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw-bf16": Optimizer("AdamW, moments in bfloat16, foreach (one temporary of all parameters)", 4, 2),
    "adamw-bf16-in-backward": Optimizer(
        "Adam, moments in bfloat16, applied in the backward parameter by parameter where the system can", 4, 0, True
    ),
    "adamw-fp32": Optimizer("AdamW with a float32 copy of the parameters and float32 moments, fused", 12, 0),
    "sgd": Optimizer("SGD without momentum", 0, 0),
    "none": Optimizer("no optimizer", 0, 0),
}
