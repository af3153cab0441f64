"""FSDP2: shard each layer, then the model, then compile the function that returns the loss.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from common import OPTIONS, batches, run, show_reports, small_llama, train
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main(steps: int) -> list[float]:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = small_llama()
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss_fn(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    compiled = torch.compile(loss_fn, backend="mstc", options=OPTIONS, dynamic=False)
    first = dist.get_rank() == 0
    losses = train(compiled, optimizer, batches(steps, seed=dist.get_rank()), show=first)
    if first:
        show_reports()
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    run(main, __doc__)
