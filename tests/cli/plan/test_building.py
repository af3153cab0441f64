"""Which model a configuration is, and for how many tokens it has positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    RobertaConfig,
    T5Config,
)

from mstc.cli.plan.building import build, eager_attention, is_causal, loss_of, positions_of
from mstc.cli.plan.draft import capture
from mstc.cli.plan.models import SHIPPED, Target, target_of
from mstc.cli.plan.peers import systems_for
from mstc.errors import PlanError
from mstc.plan.devices import device

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 100,
}
_T5 = T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=100, decoder_start_token_id=0)


@pytest.mark.parametrize(
    ("config", "name", "causal", "positions"),
    [
        (LlamaConfig(**_SMALL), "LlamaForCausalLM", True, None),
        (GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=77), "GPT2LMHeadModel", True, 77),
        (BertConfig(**_SMALL, architectures=["BertForMaskedLM"]), "BertForMaskedLM", False, 512),
        (RobertaConfig(**_SMALL), "RobertaForCausalLM", True, 512),
        (_T5, "T5ForConditionalGeneration", False, None),
        (
            LlavaConfig(text_config=LlamaConfig(**_SMALL), architectures=["LlavaForConditionalGeneration"]),
            "LlavaForConditionalGeneration",
            False,
            None,
        ),
    ],
)
def test_the_model_is_the_one_that_has_a_loss(config: Any, name: str, causal: bool, positions: int | None) -> None:
    model = build(config, torch.float32, device="cpu")
    assert type(model).__name__ == name
    assert is_causal(config) == causal
    assert positions_of(config) == positions
    assert loss_of(model)(torch.ones(1, 8, dtype=torch.long)).isfinite()


@pytest.mark.parametrize(
    ("config", "attention"), [(LlamaConfig(), "flash"), (BloomConfig(), "eager"), (FalconConfig(), None)]
)
def test_what_attends_in_eager_pytorch(config: Any, attention: str | None) -> None:
    assert eager_attention(config, "flash") == attention
    assert bool(systems_for(Target("tiny", config))) == (attention is not None)


def test_an_architecture_without_such_a_loss_is_refused() -> None:
    config = LlamaConfig(**_SMALL, architectures=["LlamaForSequenceClassification"])
    with pytest.raises(PlanError, match=r"SequenceClassification has no language-model loss .* FILE.py:FUNCTION"):
        positions_of(config)


def test_a_configuration_of_which_no_model_can_be_made() -> None:
    config = GPT2Config(n_embd=33, n_head=2, vocab_size=100)
    with pytest.raises(PlanError, match="transformers makes no GPT2LMHeadModel of this configuration: ValueError"):
        positions_of(config)


@pytest.mark.parametrize("name", [name for name in SHIPPED if not name.startswith("linear-moe")])
def test_shipped_configurations_are_models_of_their_size(name: str) -> None:
    """Gemma 2 is one that transformers runs with written-out attention only."""
    billions = {"llama2-7b": 6.74, "llama3-8b": 8.03, "mistral-7b": 7.25, "qwen2-7b": 7.62, "gemma2-9b": 9.24}
    target = target_of(name)
    assert target.positions is None
    model = build(target.config, torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions[name], abs=0.01)


def test_lists_as_indices_and_numbers_as_tensors_are_captured() -> None:
    """As Falcon splits queries from keys and GPT-Neo fills in masks."""

    def loss_fn(x: torch.Tensor) -> torch.Tensor:
        least = torch.tensor(0.0, dtype=x.dtype, device=x.device)
        return torch.where(x[:, [-1]] > 0, x, least).sum()

    x = torch.zeros(64, 8, device="meta", requires_grad=True)
    assert capture(loss_fn, [x], device("a100-80g")).step.calls
