"""One measured process: ``python -m mstc.cli.bench.worker JOB FD``.

JOB is a `Job` as JSON; an `Event` per step and at last the `Result` go, a JSON line each, to
the open file descriptor FD, so that whatever libraries print cannot mix with them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from mstc.cli.bench.data import random_batches, text_batches
from mstc.cli.bench.job import Event, Job, Result
from mstc.cli.bench.meter import Meter, Timeline, meter_for
from mstc.cli.bench.models import MODELS, build_model
from mstc.cli.bench.systems import SYSTEMS, LossFn

__all__ = ["measure"]


class Trainer:
    """A model, its loss function and, if the job trains, its optimizer."""

    def __init__(self, job: Job) -> None:
        torch.manual_seed(job.seed)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        dtype = getattr(torch, job.dtype)
        self.model: nn.Module = build_model(MODELS[job.model], job.layers).to(device=job.device, dtype=dtype)
        self.loss_fn: LossFn = SYSTEMS[job.system].build(self.model, job.options)
        self.optimizer: torch.optim.Optimizer | None = None
        if job.learning_rate:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=job.learning_rate)

    def forward_backward(self, ids: Tensor) -> float:
        loss = self.loss_fn(ids)
        torch.autograd.backward(loss)
        return loss.item()

    def update(self) -> None:
        """Take the optimizer's step, if there is one, and drop the gradients."""
        if self.optimizer is not None:
            self.optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def step(self, ids: Tensor) -> float:
        loss = self.forward_backward(ids)
        self.update()
        return loss

    def grad_norm(self) -> float:
        squares = [p.grad.double().pow(2).sum() for p in self.model.parameters() if p.grad is not None]
        return torch.stack(squares).sum().sqrt().item()


def measure(job: Job, on_step: Callable[[Event], None] = lambda event: None) -> Result:
    """Run the job's steps in this process; the first compiles and is measured apart."""
    trainer, meter = Trainer(job), meter_for(job.device)
    first_batch, *batches = _batches(job)
    first_loss, first_s = meter.timed(lambda: trainer.forward_backward(first_batch))
    grad_norm = trainer.grad_norm()
    trainer.update()
    first = Event(0, first_loss, first_s)
    on_step(first)
    meter.reset()
    with Timeline(meter) as timeline:
        events = [_measure_step(trainer, meter, i, ids, on_step) for i, ids in enumerate(batches, start=1)]
    return Result(
        system=job.system,
        seq=job.seq,
        tokens=job.batch * job.seq,
        step_s=[event.seconds for event in events],
        first_s=first_s,
        peak_mb=meter.peak(),
        rest_mb=meter.rest(),
        losses=[event.loss for event in [first, *events]],
        grad_norm=grad_norm,
        timeline=timeline.samples(),
    )


def _measure_step(trainer: Trainer, meter: Meter, number: int, ids: Tensor, on_step: Callable[[Event], None]) -> Event:
    loss, seconds = meter.timed(lambda: trainer.step(ids))
    event = Event(number, loss, seconds)
    on_step(event)
    return event


def _batches(job: Job) -> list[Tensor]:
    count = job.steps + 1
    if job.text:
        batches = text_batches(count, job.batch, job.seq, job.seed)
    else:
        batches = random_batches(count, job.batch, job.seq, MODELS[job.model].vocab, job.seed)
    return [ids.to(job.device) for ids in batches]


def main() -> None:
    job = Job.from_json(sys.argv[1])
    with os.fdopen(int(sys.argv[2]), "w", encoding="utf-8", buffering=1) as lines:

        def send(record: Event | Result) -> None:
            lines.write(json.dumps({"kind": type(record).__name__, **asdict(record)}) + "\n")

        send(measure(job, on_step=send))


if __name__ == "__main__":
    main()
