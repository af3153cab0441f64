"""Hugging Face models with ``attn_implementation="eager"``: exact, and no layer's scores are made whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from testkit.exactness import Comparison, chunked, compare
from testkit.float64 import true_float64
from testkit.hf_models import SMALL, T5, causal, from_auto, tokens

_ENCODER = {**SMALL, "attn_implementation": "eager"}
_T5 = {**T5, "attn_implementation": "eager"}
OPTIONS = chunked(query_chunks={"chunk_tokens": 16})


def eager(kind: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: causal(kind, attn_implementation="eager", **settings)


def gpt_oss() -> nn.Module:
    """Its grouped products of experts have no float64."""
    model = eager("gpt_oss", num_local_experts=4, num_experts_per_tok=2, sliding_window=16)()
    model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    return model


def masked(kind: str, auto: str = "AutoModelForMaskedLM", **settings: Any) -> Callable[[], nn.Module]:
    return lambda: from_auto(auto, kind, **{**_ENCODER, **settings})


# The model, and how many attentions are fused and how many run by chunks of queries.
CASES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "llama": (eager("llama"), 2, 0),
    "gpt2": (eager("gpt2"), 2, 0),
    "gemma2, softcap and window": (eager("gemma2"), 0, 2),
    "mistral, window": (eager("mistral"), 2, 0),
    "gpt-oss, sinks": (gpt_oss, 0, 2),
    "mpt, alibi": (eager("mpt", d_model=32, n_heads=4, n_layers=2, max_seq_len=512), 0, 2),
    "bert": (masked("bert"), 2, 0),
    "t5, relative positions": (lambda: from_auto("AutoModelForSeq2SeqLM", "t5", **_T5), 2, 4),
}


def outcome(result: Comparison) -> tuple[int, int]:
    """How many attentions were fused, and how many run by chunks of queries."""
    edits = [e.what for r in result.reports for e in r.edits]
    return (
        sum(e.startswith("written-out") for e in edits),
        sum("attention by queries" in e for e in edits),
    )


@pytest.mark.parametrize("name", CASES)
def test_exact_and_nothing_of_all_pairs(name: str) -> None:
    make, fused, chunks = CASES[name]
    model = make()

    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    with true_float64():
        result = compare(loss, dict(model.named_parameters()), (tokens(),), OPTIONS)
    print(result.describe())
    result.check()
    assert outcome(result) == (fused, chunks)
    assert result.of_all_pairs(50) == []


def test_padding() -> None:
    model = masked("bert")()
    real = torch.arange(50)[None, :] < torch.tensor([[50], [31]])

    def loss(ids: Tensor, real: Tensor) -> Tensor:
        return model(input_ids=ids, attention_mask=real, labels=ids).loss  # type: ignore[no-any-return]

    with true_float64():
        result = compare(loss, dict(model.named_parameters()), (tokens(), real), OPTIONS)
    print(result.describe())
    result.check()
    assert outcome(result) == (0, 2)
    assert result.of_all_pairs(50) == []


@pytest.mark.parametrize("kind", ["deberta-v2", "swin"])
def test_attention_of_other_forms_stays_exact(kind: str) -> None:
    """Disentangled attention and shifted windows: whatever becomes of it, the numbers stay."""
    torch.manual_seed(0)
    if kind == "swin":
        small = {"image_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": [2], "num_heads": [2]}
        exact = {"drop_path_rate": 0.0, "attn_implementation": "eager"}
        model = from_auto("AutoModelForImageClassification", kind, **small, **exact)
        inputs = (torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([0, 1]))
        names = ("pixel_values", "labels")
    else:
        settings = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
        model = masked(kind, **settings)()
        inputs, names = (tokens(), tokens()), ("input_ids", "labels")

    def loss(*given: Tensor) -> Tensor:
        return model(**dict(zip(names, given, strict=True))).loss  # type: ignore[no-any-return]

    with true_float64():
        result = compare(loss, dict(model.named_parameters()), inputs, OPTIONS)
    print(result.describe())
    result.check()
    about = [r for x in result.reports for r in x.refusals if r.pass_name in ("query_chunks", "normal_form")]
    assert outcome(result) != (0, 0) or about
