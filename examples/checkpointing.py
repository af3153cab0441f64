"""Gradient checkpointing of the model's own: it stays in the one graph, and the layers still run in loops.

python examples/checkpointing.py
"""

from __future__ import annotations

import torch
from common import OPTIONS, batches, run, show_reports, small_llama, train
from torch import Tensor


def main(steps: int) -> list[float]:
    model = small_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})  # the other kind breaks the graph
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss_fn(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    compiled = torch.compile(loss_fn, backend="mstc", options=OPTIONS, dynamic=False)
    losses = train(compiled, optimizer, batches(steps))
    show_reports()
    return losses


if __name__ == "__main__":
    run(main, __doc__)
