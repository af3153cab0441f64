"""DistributedDataParallel: wrap the model, compile the function that returns the loss, accumulate under no_sync.

torchrun --nproc-per-node 2 examples/ddp.py
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from common import OPTIONS, batches, run, show_reports, small_llama
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

ACCUMULATE = 2

# One graph instead of one per bucket: the masks are then proven in all layers, and the gradients still travel in
# buckets, but after the backward rather than along with it.
torch._dynamo.config.optimize_ddp = False


def main(steps: int) -> list[float]:
    dist.init_process_group("gloo")
    parallel = DistributedDataParallel(small_llama())
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=3e-3)

    def loss_fn(ids: Tensor) -> Tensor:
        loss: Tensor = parallel(input_ids=ids, labels=ids).loss
        return loss

    compiled = torch.compile(loss_fn, backend="mstc", options=OPTIONS, dynamic=False)
    losses = []
    for step in range(steps):
        for number, ids in enumerate(batches(ACCUMULATE, seed=10 * step + dist.get_rank())):
            last = number == ACCUMULATE - 1
            waiting: Any = contextlib.nullcontext() if last else parallel.no_sync()
            with waiting:
                loss = compiled(ids) / ACCUMULATE
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item() * ACCUMULATE)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {losses[-1]:.4f}")
    if dist.get_rank() == 0:
        show_reports()
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    run(main, __doc__)
