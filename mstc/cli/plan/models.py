"""What is planned for: a shipped or another Hugging Face configuration, or FILE.py:FUNCTION, on meta tensors."""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mstc.errors import PlanError

SHIPPED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Target:
    """What to plan, by ``name``: a configuration (``config``), a function of the tokens (``function``), or a shipped
    model that transformers does not have (``step``, a function of tokens, batch and dtype)."""

    name: str
    config: Any = None
    function: Callable[..., Any] | None = None
    step: Callable[..., Any] | None = None

    def made(self, tokens: int, batch: int, dtype: torch.dtype) -> tuple[Callable[..., Any], Sequence[Any]]:
        """The loss function and its inputs, where there is no configuration."""
        if self.step is not None:
            found: tuple[Callable[..., Any], Sequence[Any]] = self.step(tokens, batch, dtype)
            return found
        assert self.function is not None
        function, inputs = self.function(tokens)
        return function, inputs

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers) if self.config is not None else 0


def target_of(name: str) -> Target:
    """The target by that name. Raises `PlanError` where there is none or its configuration is not understood."""
    if name in SHIPPED:
        settings = {k: v for k, v in SHIPPED[name].items() if k != "source"}
        if settings["model_type"] == "linear_moe":
            return Target(name, step=_linear_moe(settings))
        return Target(name, _config(settings, name))
    if ".py:" in name:
        return Target(name, function=_function(*name.rsplit(":", 1)))
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
    except json.JSONDecodeError as error:
        raise PlanError(f"{path} is not JSON: {error}") from error
    return Target(name, _config(settings, str(path)))


def build(config: Any, layers: int, dtype: torch.dtype, attention: str = "sdpa") -> Any:
    """The model on the meta device, in training mode."""
    from transformers import AutoModelForCausalLM

    changed = type(config).from_dict({**config.to_dict(), "num_hidden_layers": layers})
    if getattr(changed, "layer_types", None):
        changed.layer_types = changed.layer_types[:layers]
    changed.use_cache = False
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(changed, attn_implementation=attention).to(dtype).train()


def loss_of(model: Any) -> Callable[[Tensor], Tensor]:
    def loss_fn(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    return loss_fn


def _config(settings: dict[str, Any], name: str) -> Any:
    from transformers import CONFIG_MAPPING

    settings = dict(settings)
    kind = settings.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        raise PlanError(f"{name}: model_type {kind!r} is none that transformers knows")
    made = CONFIG_MAPPING[kind]
    known = {*inspect.signature(made.__init__).parameters, *made().to_dict(), "architectures", "_name_or_path"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise PlanError(f"{name}: unknown keys {', '.join(unknown)} for a {kind} configuration; remove or correct them")
    return made(**{**settings, "max_position_embeddings": 1 << 24})


def _linear_moe(settings: Mapping[str, Any]) -> Callable[..., Any]:
    from mstc.cli.plan.linear_moe import Sizes, step

    return partial(step, Sizes(**{k: v for k, v in settings.items() if k != "model_type"}))


def _function(file: str, name: str) -> Callable[..., Any]:
    """The function of that name: called with the number of tokens, it returns (function, its inputs)."""
    if not Path(file).exists():
        raise PlanError(f"{file} does not exist")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise PlanError(f"{file} has no function '{name}'")
    return function  # type: ignore[no-any-return]
