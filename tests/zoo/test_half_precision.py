"""Whole models in bfloat16: no further from float64 than eager, over five seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from testkit.exactness import chunked, gradient_errors, gradients_of
from testkit.float64 import true_float64
from testkit.hf_models import causal, tokens

SEEDS = range(5)


def loss_of(model: nn.Module) -> Callable[[Tensor], Any]:
    return lambda ids: model(input_ids=ids, labels=ids).loss


def drawn(model: nn.Module, seed: int) -> None:
    """Other weights: norms' scales around 1, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(0.05 * noise if p.dim() > 1 else 1 + 0.1 * noise)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "phi", "qwen3"])
def test_as_close_to_float64_as_eager(kind: str) -> None:
    """Root mean square over seeds and gradients, and of the loss."""
    model, exact = causal(kind, torch.bfloat16), causal(kind, torch.float64)
    leaves, ids = dict(model.named_parameters()), tokens()
    torch._dynamo.reset()
    systems = {
        "eager": loss_of(model),
        "mstc": torch.compile(loss_of(model), backend="mstc", options=chunked(lower="eager")),
    }
    squares, losses = dict.fromkeys(systems, 0.0), dict.fromkeys(systems, 0.0)
    for seed in SEEDS:
        drawn(model, seed)
        exact.load_state_dict({n: v.double() for n, v in model.state_dict().items()})
        with true_float64():
            true_loss, reference = gradients_of(loss_of(exact), dict(exact.named_parameters()), (ids,))
        for system, fn in systems.items():
            loss, got = gradients_of(fn, leaves, (ids,))
            errors = gradient_errors(got, reference)
            assert errors.keys() == leaves.keys()
            squares[system] += sum(e**2 for e in errors.values())
            losses[system] += float(loss.double() - true_loss) ** 2
    print({system: (squares[system] ** 0.5, losses[system] ** 0.5) for system in systems})
    assert squares["mstc"] ** 0.5 <= 1.05 * squares["eager"] ** 0.5
    assert losses["mstc"] ** 0.5 <= 1.05 * losses["eager"] ** 0.5
