"""A Hugging Face model with its language-model loss, made of a configuration on any device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mstc.cli.target import said
from mstc.errors import PlanError

__all__ = ["build", "eager_attention", "is_causal", "loss_of", "positions_of", "with_positions"]


def build(config: Any, dtype: torch.dtype, attention: str | None = None, device: str = "meta") -> Any:
    """The model on a device, in training mode; attention: by the name that transformers has for it, None: the best that
    it has for this model. Raises `PlanError` where transformers makes no such model of the configuration."""
    return _made(config, attention, device).to(dtype).train()


def loss_of(model: Any) -> Callable[[Tensor], Tensor]:
    """Tokens in, the model's own loss out. Tokens are labels too; of an encoder-decoder both sides read them."""

    def loss_fn(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return loss_fn


def is_causal(config: Any) -> bool:
    """Whether the model reads from left to right and predicts the token that follows."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return _class_of(config) in _of(MODEL_FOR_CAUSAL_LM_MAPPING, config)


def eager_attention(config: Any, flash: str) -> str | None:
    """What attends in eager PyTorch: ``flash``, a stand-in for FlashAttention, where the model runs with that; "eager"
    where it has only its own, written out; None where its code names FlashAttention, so that nothing can stand in."""
    made = _class_of(config)
    if made._supports_attention_backend:
        return flash
    return None if made._supports_flash_attn else "eager"


def positions_of(config: Any) -> int | None:
    """For how many tokens the model has learned positions; None where it has no table of them."""
    given = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(given, int):
        return None
    sizes = {n: _parameters(_made(with_positions(config, n), None, "meta")) for n in (given, given + 64)}
    return given if sizes[given] != sizes[given + 64] else None


def with_positions(config: Any, positions: int) -> Any:
    """The configuration with so many positions, where it tells a number of them."""
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    if hasattr(text, "max_position_embeddings"):
        text.max_position_embeddings = positions
    return changed


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _made(config: Any, attention: str | None, device: str) -> Any:
    config = copy.deepcopy(config)
    config.use_cache = config.get_text_config().use_cache = False
    made = _class_of(config)
    try:
        with torch.device(device):
            model = made._from_config(config, attn_implementation=attention)
    except Exception as e:  # whatever a model of this configuration raises
        raise PlanError(f"transformers makes no {made.__name__} of this configuration: {said(e)}") from e
    if getattr(model, "loss_type", "") is None:
        model.loss_type = "ForCausalLM"  # what transformers falls back to, with a warning that would end the graph
    return model


def _class_of(config: Any) -> Any:
    """The class that the configuration names, or else the first kind of language model that there is of it."""
    import transformers

    mappings = (
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_MASKED_LM_MAPPING,
        transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )
    of_config = [c for m in mappings for c in _of(m, config)]
    named = config.architectures or [c.__name__ for c in of_config]
    found = next((c for c in of_config if c.__name__ in named), None)
    if found is None:
        raise PlanError(
            f"{' or '.join(named) or type(config).__name__} has no language-model loss that reads tokens alone; plan a "
            "function of your own, as FILE.py:FUNCTION"
        )
    return found


def _of(mapping: Any, config: Any) -> tuple[type, ...]:
    """The classes of one kind that there are of the configuration."""
    if type(config) not in mapping:
        return ()
    found = mapping[type(config)]
    return tuple(found) if isinstance(found, (tuple, list)) else (found,)
