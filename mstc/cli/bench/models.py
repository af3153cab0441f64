"""The models that are measured, with random weights: Hugging Face's Llama and Mistral, and written-out attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from mstc.cli.bench.written import KINDS, WrittenDecoder

__all__ = ["MODELS", "ModelSize", "build_model", "checkpoint_layers"]


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a Llama: width, MLP width, layers, heads, key/value heads, vocabulary.

    attention: a kind of `mstc.cli.bench.written` instead of a Llama; window: a Mistral that attends to so many keys;
    batch: "padded", 512 tokens on the left, or "packed", documents of 1024 tokens, told beside the ids.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    attention: str = ""
    window: int = 0
    batch: Literal["", "padded", "packed"] = ""


_LLAMA = ModelSize(hidden=512, intermediate=1792, layers=4, heads=8, kv_heads=2, vocab=32000)
MODELS: dict[str, ModelSize] = {
    "llama": _LLAMA,
    "llama-padded": replace(_LLAMA, batch="padded"),
    "llama-packed": replace(_LLAMA, batch="packed"),
    "llama-bytes": ModelSize(hidden=128, intermediate=448, layers=4, heads=4, kv_heads=2, vocab=256),
    "llama-tiny": ModelSize(hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, vocab=256),
    "mistral": replace(_LLAMA, window=1024),
    "llama3-8b": ModelSize(hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, vocab=128256),
    **{
        f"written-{kind}": ModelSize(256, 0, layers=2, heads=4, kv_heads=4, vocab=256, attention=kind) for kind in KINDS
    },
}


def build_model(size: ModelSize, layers: int | None = None) -> nn.Module:
    """A model of this size in training mode; the caller seeds it and places it."""
    size = replace(size, layers=layers or size.layers)
    if size.attention:
        return WrittenDecoder(size.attention, size.hidden, size.layers, size.heads, size.vocab).train()
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    settings = {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocab,
        "max_position_embeddings": 1 << 20,
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    model: Any
    if size.window:
        model = MistralForCausalLM(MistralConfig(**settings, sliding_window=size.window))
    else:
        model = LlamaForCausalLM(LlamaConfig(**settings))
    if size.batch:
        model.model.register_forward_pre_hook(_Batches(size.batch), with_kwargs=True)
    assert isinstance(model, nn.Module)
    return model.train()


class _Batches:
    """Hands what a tokenizer or a packing collator tells of a batch to a model's trunk, as values of run time."""

    def __init__(self, kind: Literal["padded", "packed"]) -> None:
        at = torch.arange(1 << 20)
        name, values = ("attention_mask", (at >= 512).long()) if kind == "padded" else ("position_ids", at % 1024)
        self._name, self._values = name, values

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs["input_ids"]
        return args, {**kwargs, self._name: self._values[: ids.shape[1]].to(ids.device).expand(ids.shape)}


def checkpoint_layers(model: Any, **settings: Any) -> None:
    """Hugging Face's checkpointing of every layer, by the name that this version of transformers has for it."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)(settings)
