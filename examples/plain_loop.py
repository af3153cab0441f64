"""A plain training loop with gradient accumulation: compile the function that returns the loss.

python examples/plain_loop.py
"""

from __future__ import annotations

import torch
from common import OPTIONS, batches, run, show_reports, small_llama
from torch import Tensor

ACCUMULATE = 2


def main(steps: int) -> list[float]:
    model = small_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss_fn(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    compiled = torch.compile(loss_fn, backend="mstc", options=OPTIONS, dynamic=False)
    losses = []
    for step in range(steps):
        for ids in batches(ACCUMULATE, seed=step):
            loss = compiled(ids) / ACCUMULATE
            loss.backward()  # outside: inside the compiled function it would break the graph
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() * ACCUMULATE)
        print(f"step {step}: loss {losses[-1]:.4f}")
    show_reports()
    return losses


if __name__ == "__main__":
    run(main, __doc__)
