"""What is planned for: a shipped or another Hugging Face configuration, or FILE.py:FUNCTION, on meta tensors."""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mstc.cli.target import call_of
from mstc.errors import PlanError

SHIPPED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))

_OLDER = ("rope_theta", "rope_scaling", "torch_dtype")  # keys that transformers converts to newer ones
_NEARLY = 0.85  # of difflib's ratio: "hiden_size" and "hidden_size" have 0.95, "torch_dtype" and "dtype" 0.63


@dataclass(frozen=True)
class Target:
    """What to plan, by ``name``: a configuration (``config``), a shipped model that transformers does not have
    (``step``, a function of tokens, batch and dtype), or else FILE.py:FUNCTION."""

    name: str
    config: Any = None
    step: Callable[..., Any] | None = None

    @property
    def of_user(self) -> bool:
        """FILE.py:FUNCTION, which sets batch and dtype itself."""
        return self.config is None and self.step is None

    def made(
        self, tokens: int, batch: int, dtype: torch.dtype, device: str = "meta"
    ) -> tuple[Callable[..., Any], Sequence[Any]]:
        """The loss function and its inputs, where there is no configuration."""
        if self.step is not None:
            found: tuple[Callable[..., Any], Sequence[Any]] = self.step(tokens, batch, dtype, device)
            return found
        return call_of(self.name, tokens, device)


def target_of(name: str) -> Target:
    """The target by that name. Raises `PlanError` where there is none or its configuration is not understood."""
    if name in SHIPPED:
        settings = {k: v for k, v in SHIPPED[name].items() if k != "source"}
        if settings["model_type"] == "linear_moe":
            return Target(name, step=_linear_moe(settings))
        return Target(name, _config(settings, name))
    if ".py:" in name:
        return Target(name)
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not path.exists():
        raise PlanError(
            f"unknown model '{name}': give one of {', '.join(SHIPPED)}, FILE.py:FUNCTION, or the path of a "
            "Hugging Face config.json"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError, and bytes that are no text
        more = f"; a function is given as {name}:FUNCTION" if path.suffix == ".py" else ""
        raise PlanError(f"{path} is not JSON: {error}{more}") from error
    if not isinstance(settings, dict):
        raise PlanError(f"{path} must hold a model's configuration, a JSON object; it is a {type(settings).__name__}")
    return Target(name, _config(settings, str(path)))


def build(config: Any, dtype: torch.dtype, attention: str = "sdpa", device: str = "meta") -> Any:
    """The model on a device, in training mode."""
    from transformers import AutoModelForCausalLM

    changed = type(config).from_dict(config.to_dict())
    changed.use_cache = False
    with torch.device(device):
        return AutoModelForCausalLM.from_config(changed, attn_implementation=attention).to(dtype).train()


def loss_of(model: Any) -> Callable[[Tensor], Tensor]:
    def loss_fn(ids: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return loss_fn


def _config(settings: dict[str, Any], name: str) -> Any:
    from transformers import CONFIG_MAPPING

    settings = dict(settings)
    kind = settings.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise PlanError(f"{name}: model_type {kind!r} is none that transformers knows")
    made = CONFIG_MAPPING[kind]
    unknown = _misspelt(settings, {*inspect.signature(made.__init__).parameters, *made().to_dict()})
    if unknown:
        raise PlanError(f"{name}: unknown keys {', '.join(unknown)} for a {kind} configuration; remove or correct them")
    return made(**{**settings, "max_position_embeddings": 1 << 24})


def _misspelt(settings: Mapping[str, Any], known: set[str]) -> list[str]:
    """Unknown keys that may be sizes: their value is a whole number, or their name is nearly a known one.

    Published configurations hold other keys besides, which transformers converts or ignores.
    """
    odd = {k: v for k, v in settings.items() if k not in known and k not in _OLDER}
    return sorted(
        k for k, v in odd.items() if type(v) is int or difflib.get_close_matches(k, known, n=1, cutoff=_NEARLY)
    )


def _linear_moe(settings: Mapping[str, Any]) -> Callable[..., Any]:
    from mstc.cli.plan.linear_moe import Sizes, step

    return partial(step, Sizes(**{k: v for k, v in settings.items() if k != "model_type"}))
