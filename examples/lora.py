"""LoRA with PEFT: adapters first, then compile; frozen weights cost no gradients.

python examples/lora.py
"""

from __future__ import annotations

import torch
from common import OPTIONS, batches, run, show_reports, small_llama, train
from peft import LoraConfig, get_peft_model
from torch import Tensor


def main(steps: int) -> list[float]:
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear")
    model = get_peft_model(small_llama(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def loss_fn(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    compiled = torch.compile(loss_fn, backend="mstc", options=OPTIONS, dynamic=False)
    losses = train(compiled, optimizer, batches(steps))
    show_reports()
    return losses


if __name__ == "__main__":
    run(main, __doc__)
