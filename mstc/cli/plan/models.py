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

from mstc.cli.plan.building import positions_of, with_positions
from mstc.cli.target import call_of, said
from mstc.errors import PlanError

SHIPPED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("models.json").read_text(encoding="utf-8"))

# Keys that transformers converts to newer ones, or no longer reads.
_OLDER = ("rope_theta", "rope_scaling", "torch_dtype", "n_ctx", "n_positions", "seq_length", "pretraining_tp")
_UNBOUNDED = 1 << 24  # positions of a model that has no table of them: beyond any length that is planned
_NEARLY = 0.85  # of difflib's ratio: "hiden_size" and "hidden_size" have 0.95, "torch_dtype" and "dtype" 0.63


@dataclass(frozen=True)
class Target:
    """What to plan, by ``name``: a configuration (``config``), a shipped model that transformers does not have
    (``step``, a function of tokens, batch and dtype), or else FILE.py:FUNCTION.

    positions: the most tokens that a configuration's model has learned positions for, None where any number will do.
    """

    name: str
    config: Any = None
    step: Callable[..., Any] | None = None
    positions: int | None = None

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


def target_of(name: str, ignore_unknown: bool = False) -> Target:
    """The target by that name. Raises `PlanError` where there is none or its configuration is not understood.

    ignore_unknown: leave out keys that transformers does not know, instead of refusing them.
    """
    if name in SHIPPED:
        settings = {k: v for k, v in SHIPPED[name].items() if k != "source"}
        if settings["model_type"] == "linear_moe":
            return Target(name, step=_linear_moe(settings))
        return _of_config(name, settings, name, ignore_unknown)
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
    return _of_config(name, settings, str(path), ignore_unknown)


def _of_config(name: str, settings: Mapping[str, Any], source: str, ignore_unknown: bool) -> Target:
    config = _config(settings, source, ignore_unknown)
    positions = positions_of(config)
    return Target(name, config if positions else with_positions(config, _UNBOUNDED), positions=positions)


def _config(settings: Mapping[str, Any], source: str, ignore_unknown: bool) -> Any:
    from transformers import CONFIG_MAPPING

    kind = str(settings.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise PlanError(f"{source}: model_type '{kind}' is none that transformers knows")
    made = CONFIG_MAPPING[kind]
    if not ignore_unknown:
        _require_known(settings, made, kind, source)
    try:
        return made(**{k: v for k, v in settings.items() if k != "model_type"})
    except Exception as e:  # whatever a configuration of this kind raises
        raise PlanError(f"{source} is no {kind} configuration: {said(e)}") from e


def _require_known(settings: Mapping[str, Any], made: Any, kind: str, source: str) -> None:
    """No misspelt key, in the configurations of its parts neither."""
    from transformers import CONFIG_MAPPING

    unknown = _misspelt(settings, {"model_type", *inspect.signature(made.__init__).parameters, *made().to_dict()})
    if unknown:
        raise PlanError(
            f"{source}: unknown keys {', '.join(unknown)} for a {kind} configuration; correct them, or leave them out "
            "by --ignore-unknown"
        )
    for key, part in made.sub_configs.items():
        given = settings.get(key)
        if isinstance(given, dict):
            own = given.get("model_type", getattr(part, "model_type", ""))
            if own in CONFIG_MAPPING:
                _require_known(given, CONFIG_MAPPING[own], own, f"{source}: {key}")


def _misspelt(settings: Mapping[str, Any], known: set[str]) -> list[str]:
    """Unknown keys that may be sizes: their value is a whole number, or their name is nearly a known one.

    Published configurations hold other keys besides, which transformers converts or ignores.
    """
    from transformers import GenerationConfig

    harmless = {*_OLDER, *GenerationConfig().to_dict()}  # older configurations hold how to generate
    odd = {k: v for k, v in settings.items() if k not in known | harmless and not k.endswith("_token_id")}
    return sorted(
        k for k, v in odd.items() if type(v) is int or difflib.get_close_matches(k, known, n=1, cutoff=_NEARLY)
    )


def _linear_moe(settings: Mapping[str, Any]) -> Callable[..., Any]:
    from mstc.cli.plan.linear_moe import Sizes, step

    return partial(step, Sizes(**{k: v for k, v in settings.items() if k != "model_type"}))
