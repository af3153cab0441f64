"""Hugging Face models of tiny random configuration, without dropout unless it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

_BASE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_NAMES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
_WINDOW = {"sliding_window": 16}

# Causal language models: what each needs besides the common settings.
CAUSAL: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": _WINDOW,
    "gemma": {},
    "gemma2": _WINDOW,
    "gemma3_text": _WINDOW,
    "phi": {},
    "phi3": {},
    "gpt2": _GPT2_NAMES,
    "gptj": {**_GPT2_NAMES, "rotary_dim": 4},
    "gpt_neox": {},
    "olmo2": {},
    "granite": {},
    "cohere": {},
    "glm4": {},
    "starcoder2": {},
    "stablelm": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "nemotron": {},
    "smollm3": {},
}

# Mixtures of experts.
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}

_DROPOUTS = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "resid_pdrop",
    "embd_pdrop",
    "attn_pdrop",
    "dropout_rate",
)


# Settings of tiny encoders, and of T5, for `from_auto`.
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 96,
    "decoder_start_token_id": 0,
    "use_cache": False,
}

# Of `in_training` where peaks are compared: wide enough that activations weigh more than what is rounded.
FOR_PEAKS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 224,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
}


def config_of(kind: str, dropout: float = 0.0, **settings: Any) -> Any:
    """A configuration with all dropouts at ``dropout``."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**settings)
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config


def causal(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """A causal language model in training mode; the same random weights each time."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    known = {**_BASE, **CAUSAL.get(kind, EXPERTS.get(kind, {})), **settings}
    model: nn.Module = AutoModelForCausalLM.from_config(config_of(kind, **known))
    model.loss_type = "ForCausalLM"  # type: ignore[assignment]  # without it GPT-2 warns, which breaks the graph
    return model.to(dtype).train()


def in_training(kind: str, **settings: Any) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
    """A causal language model in float32 as transformers initializes it, and its loss as a function of the tokens."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_of(kind, **{**_BASE, **settings})).train()

    def loss_fn(ids: torch.Tensor) -> torch.Tensor:
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    return model, loss_fn


def from_auto(auto: str, kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> nn.Module:
    """Any other model: ``auto`` is the name of a transformers auto class, e.g. AutoModelForMaskedLM."""
    import transformers

    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, auto).from_config(config_of(kind, **settings))
    return model.to(dtype).train()


def tokens(batch: int = 2, length: int = 50, below: int = 96) -> torch.Tensor:
    return torch.randint(3, below, (batch, length), generator=torch.Generator().manual_seed(1))


class FoldingTrunk(nn.Module):
    """Two blocks of ESMFold: a sequence [1, L, 16] and its pairs [1, L, L, 8], whose sides meet in every block."""

    def __init__(self) -> None:
        from transformers.models.esm.modeling_esmfold import EsmFoldTriangularSelfAttentionBlock

        super().__init__()
        sizes = {"sequence_state_dim": 16, "pairwise_state_dim": 8, "sequence_head_width": 8, "pairwise_head_width": 4}
        config: Any = SimpleNamespace(**sizes, dropout=0.0, chunk_size=None, num_blocks=2)
        self.blocks = nn.ModuleList(EsmFoldTriangularSelfAttentionBlock(config) for _ in range(2))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.2)  # some are made as zeros: nothing would reach the others

    def forward(self, sequence: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            sequence, pairs = block(sequence, pairs)
        return sequence.square().mean() + pairs.square().mean()
