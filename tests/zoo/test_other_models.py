"""Models that nobody patched for: loss and every gradient, loops where the model works token by token."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from testkit.exactness import chunked, compare, products_outside
from testkit.float64 import true_float64
from testkit.hf_models import SMALL, T5, FoldingTrunk, from_auto, tokens
from testkit.homegrown import Encoder, GatedScan, MlpMixer, MlpStack, NanoGPT, PatchTransformer

_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "use_cache": False,
}


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _classes(below: int, *shape: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """make: the model; inputs; call: from the model to a function that returns the loss; loops: at least so many;

    outside: the products that stay outside loops, by the shape of their results.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    loops: int
    outside: tuple[tuple[int, ...], ...] = ()
    keywords: tuple[str, ...] = ()


def _text() -> tuple[Tensor, ...]:
    return (tokens(),)


def _two_texts() -> tuple[Tensor, ...]:
    return tokens(), tokens(2, 37)


def _labeled(below: int, *shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (_floats(2, 50, 32), _classes(below, *shape))


_LANGUAGE = ("input_ids", "labels")
_IMAGES = ("pixel_values", "labels")
_MASKED = "AutoModelForMaskedLM"

CASES: dict[str, Case] = {
    "nanogpt, fused attention": Case(lambda: NanoGPT(True), _text, 4),
    "nanogpt, written-out attention": Case(lambda: NanoGPT(False), _text, 4),
    "nanogpt, checkpointed blocks": Case(lambda: NanoGPT(True, checkpointed=True), _text, 4),
    "bert": Case(lambda: from_auto(_MASKED, "bert", **SMALL), _text, 4, (), _LANGUAGE),
    "roberta": Case(lambda: from_auto(_MASKED, "roberta", **SMALL), _text, 4, (), _LANGUAGE),
    # One row per image: the head has no tokens.
    "vit": Case(
        lambda: from_auto("AutoModelForImageClassification", "vit", image_size=32, patch_size=4, **SMALL),
        lambda: (_floats(2, 3, 32, 32), _classes(2, 2)),
        3,
        ((2, 2),),
        _IMAGES,
    ),
    "home-grown vit": Case(PatchTransformer, lambda: (_floats(2, 3, 32, 32), _classes(10, 2)), 3, ((2, 10),)),
    "t5": Case(lambda: from_auto("AutoModelForSeq2SeqLM", "t5", **T5), _two_texts, 9, (), _LANGUAGE),
    "bart": Case(lambda: from_auto("AutoModelForSeq2SeqLM", "bart", **_BART), _two_texts, 9, (), _LANGUAGE),
    "folding trunk": Case(FoldingTrunk, lambda: (_floats(1, 30, 16), _floats(1, 30, 30, 8)), 26),
    "mlp stack on rows": Case(MlpStack, lambda: (_floats(70, 32), _floats(70, 32)), 1),
    "mlp stack on sequences": Case(MlpStack, lambda: (_floats(2, 50, 32), _floats(2, 50, 32)), 1),
    "transformer encoder": Case(lambda: Encoder(norm_first=False), _labeled(7, 2, 50), 4),
    "transformer encoder, norms first": Case(lambda: Encoder(norm_first=True), _labeled(7, 2, 50), 4),
    "mlp-mixer": Case(MlpMixer, lambda: (_floats(5, 50, 32), _classes(7, 5)), 1),
    "gated scan": Case(GatedScan, _text, 3),
}


def _call(model: nn.Module, keywords: tuple[str, ...]) -> Any:
    if not keywords:
        return model

    def loss(*inputs: Tensor) -> Tensor:
        given = inputs if len(inputs) == len(keywords) else inputs * len(keywords)
        return model(**dict(zip(keywords, given, strict=True))).loss  # type: ignore[no-any-return]

    return loss


@pytest.mark.parametrize("name", CASES)
def test_exact_and_in_loops(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    model = case.make().double().train()
    with true_float64():
        result = compare(_call(model, case.keywords), dict(model.named_parameters()), case.inputs(), chunked())
    print(result.describe())
    result.check()
    assert len(result.graphs) == 1
    left = products_outside(result.graphs[0])
    assert len(left) == len(case.outside), left
    assert all(str(shape) in text for shape, text in zip(case.outside, left, strict=True)), left
    assert result.loops >= case.loops
    regions = result.reports[0].regions
    assert all(r.label and re.search(r"\.py:\d+$", r.source) for r in regions)
    assert any("MLP" in r.label for r in regions)
    # T5 adds learned biases, which the fused op is given as a mask.
    unnamed = [r for r in regions if "(explicit mask)" in r.label]
    assert bool(unnamed) == (name == "t5"), unnamed
