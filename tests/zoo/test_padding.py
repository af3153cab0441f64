"""Padded and packed batches: exact, and no mask of all pairs where PyTorch's attention is called with one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mstc.graph.attention import WINDOW_ATTENTION
from mstc.passes import masks
from testkit.exactness import chunked, compare
from testkit.float64 import true_float64
from testkit.hf_models import SMALL, causal, from_auto, tokens
from testkit.shares import every

LENGTH = 61  # equals no other size


def _mask(left: int, right: int) -> Tensor:
    at = torch.arange(LENGTH)
    return torch.stack([at >= left, at < LENGTH - right]).long()


def _packed() -> Tensor:
    lengths = ((20, 30, 11), (40, 1, 20))
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])


BATCHES: dict[str, tuple[str, Callable[[], Tensor]]] = {
    "padded right": ("attention_mask", lambda: _mask(0, 17)),
    "padded left": ("attention_mask", lambda: _mask(23, 0)),
    "padded on both sides": ("attention_mask", lambda: _mask(23, 17)),
    "packed": ("position_ids", _packed),
}
NUMBERS = {
    "local_attention": 16,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "bos_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    **{kind: lambda kind=kind: causal(kind) for kind in ("llama", "mistral", "gemma3_text", "qwen3", "olmo2", "phi3")},
    "bert": lambda: from_auto("AutoModelForMaskedLM", "bert", **SMALL),
    "modernbert": lambda: from_auto("AutoModelForMaskedLM", "modernbert", **SMALL, **NUMBERS),
}  # fmt: skip
CASES = [
    (model, batch)
    for model in MODELS
    for batch in BATCHES
    if batch != "packed" or not model.endswith("bert")  # encoders know of no packing
]


@pytest.mark.parametrize("case", every(4, CASES), ids=", ".join)
def test_exact_and_nothing_of_all_pairs(case: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "FEWEST_TOKENS", 1)
    model, (argument, make) = MODELS[case[0]](), BATCHES[case[1]]

    def loss(ids: Tensor, given: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids, **{argument: given}).loss  # type: ignore[no-any-return]

    with true_float64():
        result = compare(loss, dict(model.named_parameters()), (tokens(length=LENGTH), make()), chunked())
    print(result.describe())
    result.check()
    assert any(n.target is WINDOW_ATTENTION for gm in result.graphs for n in gm.graph.nodes)
    assert result.of_all_pairs(LENGTH) == []
