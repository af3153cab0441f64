"""The compared systems: each turns a Hugging Face causal model into a function from ids to the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from mstc.cli.bench.mini_sequence import cut_mlps, head_loss
from mstc.cli.bench.models import checkpoint_layers
from mstc.compat import set_activation_memory_budget

__all__ = ["DEFAULT", "INDUCTOR_VARIANTS", "SYSTEMS", "LossFn", "System"]

LossFn = Callable[[Tensor], Tensor]  # ids [B, S] -> the mean loss, a scalar

_HEAD_CHUNK = 512  # tokens per chunk of F.linear_cross_entropy; its default holds all logits at once
_HAS_LINEAR_CE = hasattr(nn, "LinearCrossEntropyOptions")  # torch 2.13
_BUDGETS = (0.0, 0.25, 0.5, 0.75)  # 1.0 is Inductor's default
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
)
_CHUNKER_THRESHOLD = 4  # auto_chunker's amplification above which it chunks; its default leaves this head alone


@dataclass(frozen=True)
class System:
    """A system by what people call it, and how to build it from a model and (for mstc) options."""

    about: str
    build: Callable[[Any, dict[str, Any]], LossFn]
    compiles: bool = True


def _model_loss(model: Any) -> LossFn:
    def loss_fn(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return loss_fn


def _eager(model: Any, options: dict[str, Any]) -> LossFn:
    return _model_loss(model)


def _checkpointing(model: Any, options: dict[str, Any]) -> LossFn:
    checkpoint_layers(model, use_reentrant=False)
    return _model_loss(model)


def _selective(model: Any, options: dict[str, Any]) -> LossFn:
    """Every layer runs again but for its attention, which costs most."""
    contexts = partial(create_selective_checkpoint_contexts, list(_ATTENTION))
    checkpoint_layers(model, use_reentrant=False, context_fn=contexts)
    return _model_loss(model)


def _inductor_budget(budget: float) -> Callable[[Any, dict[str, Any]], LossFn]:
    def build(model: Any, options: dict[str, Any]) -> LossFn:
        set_activation_memory_budget(budget)
        return torch.compile(_model_loss(model))

    return build


def _inductor(model: Any, options: dict[str, Any]) -> LossFn:
    return torch.compile(_model_loss(model))


def _inductor_checkpointing(model: Any, options: dict[str, Any]) -> LossFn:
    checkpoint_layers(model, use_reentrant=False)
    return torch.compile(_model_loss(model))


def _mini_sequence(model: Any, options: dict[str, Any]) -> LossFn:
    checkpoint_layers(model, use_reentrant=True, preserve_rng_state=False)
    cut_mlps(model)

    def loss_fn(ids: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
        return head_loss(hidden, ids[:, 1:], model.lm_head.weight) / (ids.numel() - ids.shape[0])

    return loss_fn


def _liger(model: Any, options: dict[str, Any]) -> LossFn:
    """Its kernels for norms, rotary embedding, MLPs and the head with its loss, under checkpointing."""
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise RuntimeError("Liger is not installed: pip install liger-kernel (its kernels need a GPU)") from error
    apply_liger_kernel_to_llama(model=model)
    checkpoint_layers(model, use_reentrant=False)
    return _model_loss(model)


def _inductor_chunker(model: Any, options: dict[str, Any]) -> LossFn:
    chunker: dict[str, Any] = {
        "auto_chunker.enable": True,
        "auto_chunker.amplify_ratio_threshold": _CHUNKER_THRESHOLD,
    }
    return torch.compile(_model_loss(model), options=chunker)


def _inductor_linear_ce(model: Any, options: dict[str, Any]) -> LossFn:
    """The head and loss by hand through F.linear_cross_entropy."""
    if not _HAS_LINEAR_CE:
        raise RuntimeError(f"F.linear_cross_entropy needs torch 2.13 or later, this is {torch.__version__}")
    chunked = nn.LinearCrossEntropyOptions(batch_chunk_size=_HEAD_CHUNK)

    def loss_fn(ids: Tensor) -> Tensor:
        hidden = model.model(input_ids=ids).last_hidden_state[:, :-1].flatten(0, 1)
        target = ids[:, 1:].flatten()
        return nn.functional.linear_cross_entropy(hidden, model.lm_head.weight, target, options=chunked)

    return torch.compile(loss_fn)


def _inductor_causal(model: Any, options: dict[str, Any]) -> LossFn:
    """The explicit mask that the compiled model builds, removed by hand."""
    if getattr(model.config, "sliding_window", None):
        raise ValueError("without its mask this model would attend beyond its window; leave inductor-causal out")
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def causal(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **settings: Any) -> Any:
        return sdpa_attention_forward(module, q, k, v, None, **{**settings, "is_causal": True})

    AttentionInterface.register("causal", causal)
    model.set_attn_implementation("causal")
    return torch.compile(_model_loss(model))


def _mstc(model: Any, options: dict[str, Any]) -> LossFn:
    return torch.compile(_model_loss(model), backend="mstc", options=dict(options))


_USUAL = {
    "eager": System("eager", _eager, compiles=False),
    "ckpt": System("gradient checkpointing", _checkpointing, compiles=False),
    "inductor": System("Inductor", _inductor),
    "inductor-chunker": System(f"Inductor + auto_chunker (threshold {_CHUNKER_THRESHOLD})", _inductor_chunker),
    "inductor-linear-ce": System(f"Inductor + F.linear_cross_entropy ({_HEAD_CHUNK})", _inductor_linear_ce),
    "inductor-causal": System("Inductor, causal mask removed by hand", _inductor_causal),
    "mstc": System("mstc", _mstc),
}
SYSTEMS: dict[str, System] = {
    **_USUAL,
    "ckpt-selective": System("checkpointing, attention kept", _selective, compiles=False),
    "inductor-ckpt": System("Inductor + checkpointing", _inductor_checkpointing),
    "mini-sequence": System("Mini-Sequence, as published", _mini_sequence, compiles=False),
    "liger": System("Liger + checkpointing", _liger, compiles=False),
    **{
        f"inductor-budget-{budget:g}": System(
            f"Inductor, activation_memory_budget {budget:g}", _inductor_budget(budget)
        )
        for budget in _BUDGETS
    },
}
DEFAULT = tuple(name for name in _USUAL if _HAS_LINEAR_CE or name != "inductor-linear-ce")
INDUCTOR_VARIANTS = tuple(name for name in DEFAULT if name.startswith("inductor"))
