"""Models in training mode with their dropout of 0.1: eager's numbers for the same seed, loops in every layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from testkit.exactness import chunked, gradient_errors, gradients_of, loops_of, lowered_graphs, products_outside
from testkit.float64 import true_float64
from testkit.hf_models import SMALL, T5, causal, from_auto, tokens


@dataclass(frozen=True)
class Case:
    """make: the model; inputs: by keyword; loops: at least so many; outside: products with a weight outside loops."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Tensor]]
    loops: int
    outside: int = 0


def _text() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def _two_texts() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens(2, 37)}


def _images() -> dict[str, Tensor]:
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": torch.tensor([0, 1])}


CASES = {
    "gpt2": Case(lambda: causal("gpt2", dropout=0.1), _text, 5),
    "bert": Case(lambda: from_auto("AutoModelForMaskedLM", "bert", dropout=0.1, **SMALL), _text, 4),
    "t5": Case(lambda: from_auto("AutoModelForSeq2SeqLM", "t5", dropout=0.1, **T5), _two_texts, 9),
    "vit": Case(
        lambda: from_auto("AutoModelForImageClassification", "vit", dropout=0.1, image_size=32, patch_size=4, **SMALL),
        _images,
        3,
        outside=1,  # one row per image: the head has no tokens
    ),
}


def _seeded(fn: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        torch.manual_seed(5)
        return fn(*args)

    return run


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_of_eager(name: str) -> None:
    case = CASES[name]
    model = case.make().double().train()
    given = case.inputs()
    leaves = dict(model.named_parameters())

    def loss_of(*values: Tensor) -> Tensor:
        return model(**dict(zip(given, values, strict=True))).loss  # type: ignore[no-any-return]

    with true_float64(), lowered_graphs() as graphs:
        loss, reference = gradients_of(_seeded(loss_of), leaves, tuple(given.values()))
        state = torch.get_rng_state()
        with torch.no_grad():
            assert not torch.equal(loss_of(*given.values()), loss)  # dropout is on
        torch._dynamo.reset()
        compiled = torch.compile(loss_of, backend="mstc", options=chunked(lower="eager"))
        got, gradients = gradients_of(_seeded(compiled), leaves, tuple(given.values()))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(got, loss, rtol=1e-9, atol=0)
    assert max(gradient_errors(gradients, reference).values()) < 1e-9
    (gm,) = graphs
    assert len(products_outside(gm)) == case.outside, products_outside(gm)
    assert len(loops_of(gm)) >= case.loops
