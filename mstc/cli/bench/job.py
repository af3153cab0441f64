"""What one worker measures, and what it says while it does: frozen records that travel as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

__all__ = ["Event", "Job", "Result"]


@dataclass(frozen=True)
class Job:
    """One system on one model and length, for one process.

    steps: measured steps after the first, which compiles; learning_rate: 0 measures forward and
    backward only, otherwise AdamW takes a step after each; text: train on the standard library's
    source files rather than on random tokens; layers: None keeps the model's own number.
    """

    system: str
    model: str
    seq: int
    steps: int
    layers: int | None = None
    batch: int = 1
    seed: int = 0
    threads: int | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    text: bool = False
    learning_rate: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Event:
    """One finished step. ``step`` counts from 0, the step that compiles; ``seconds`` is its wall time."""

    step: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Result:
    """What one worker measured. Times in seconds, memory in MB (2**20 bytes).

    step_s: each measured step; first_s: the step that compiled; peak_mb: the highest memory in
    the measured steps above what rested before them, None where it cannot be measured; losses:
    of all steps, the first included; grad_norm: over all parameters after the first step;
    timeline: (seconds, MB above rest) samples of the measured steps.
    """

    system: str
    seq: int
    tokens: int
    step_s: list[float]
    first_s: float
    peak_mb: float | None
    rest_mb: float | None
    losses: list[float]
    grad_norm: float
    timeline: list[tuple[float, float]]
