"""LoRA and gradient checkpointing together: PEFT breaks the graph, and each part is rewritten by itself."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import mstc
from testkit.exactness import BOUNDS, chunked, gradient_errors, gradients_of
from testkit.hf_models import causal, tokens


def test_gradients_of_the_adapters() -> None:
    torch._dynamo.reset()
    mstc.clear_reports()
    model = causal("llama", torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, settings).train()  # type: ignore[arg-type]
    leaves = {n: p for n, p in adapted.named_parameters() if p.requires_grad}

    def loss(ids: Tensor) -> Tensor:
        return adapted(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]

    expected, reference = gradients_of(loss, leaves, (tokens(2, 50),))
    fast = torch.compile(loss, backend="mstc", options=chunked(7, 5, "aot_eager"))
    found, gradients = gradients_of(fast, leaves, (tokens(2, 50),))
    assert abs(found - expected).item() <= BOUNDS[torch.float32] * abs(expected).item()
    assert gradients.keys() == reference.keys() and all(g is not None for g in gradients.values())
    assert max(gradient_errors(gradients, reference).values()) <= BOUNDS[torch.float32]
    assert sum(bool(r.loop) for report in mstc.reports() for r in report.regions) >= 4
