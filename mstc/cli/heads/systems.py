"""What runs the programs: mstc and Inductor's auto_chunker compile them, the others have a form of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mstc.cli.heads.programs import PROGRAMS, Inputs, Result

__all__ = ["SYSTEMS", "System"]

Run = Callable[[Inputs], Result]
# Tokens per chunk of a system that must be told and is not.
TOLD = 512


@dataclass(frozen=True)
class System:
    """about: in the table; form: the program as this system runs it, or None; needs: a package that must be there;

    told: what its documentation or sources say of a program, where it has no form to run here.
    """

    about: str
    form: Callable[[str, int | None], Run | None]
    needs: str = "torch"
    told: Mapping[str, str] = field(default_factory=dict)

    @property
    def there(self) -> bool:
        return find_spec(self.needs) is not None


def _eager(name: str, chunk: int | None) -> Run:
    return PROGRAMS[name].run


def _mstc(name: str, chunk: int | None, lower: str = "inductor") -> Run:
    tokens = {"chunk_tokens": "auto" if chunk is None else chunk}
    options: dict[str, Any] = {"lm_head": tokens, "mini_sequence": tokens, "lower": lower}
    return torch.compile(PROGRAMS[name].run, backend="mstc", options=options)


def _inductor(name: str, chunk: int | None) -> Run:
    return torch.compile(PROGRAMS[name].run)


def _auto_chunker(name: str, chunk: int | None) -> Run:
    # Thresholds as low as they go, so that nothing is declined for its size.
    settings: dict[str, Any] = {
        "auto_chunker.enable": True,
        "auto_chunker.amplify_ratio_threshold": 1,
        "auto_chunker.output_size_threshold": 1,
    }
    return torch.compile(PROGRAMS[name].run, options=settings)


# ------------------------------------------------------------------ F.linear_cross_entropy


def _linear_ce(name: str, chunk: int | None) -> Run | None:
    """The chunked form of torch 2.13; ``batch_chunk_size`` is what makes it chunk."""
    if not hasattr(F, "linear_cross_entropy"):
        return None
    chunked = nn.LinearCrossEntropyOptions(batch_chunk_size=TOLD if chunk is None else chunk)

    def loss(i: Inputs, head: str = "weight", labels: Any = None, hidden: Any = None, **more: Any) -> Any:
        rows = (i.hidden if hidden is None else hidden).flatten(0, 1)
        target = (i.labels if labels is None else labels).flatten()
        return F.linear_cross_entropy(rows, getattr(i, head), target, options=chunked, **more)

    return _forms(loss, bias="linear_bias", classes="weight").get(name)


def _forms(loss: Callable[..., Any], bias: str, classes: str) -> dict[str, Run]:
    """What any fused linear cross-entropy with these options expresses; ``loss`` takes the inputs and options."""
    return {
        "mean": loss,
        "sum": lambda i: loss(i, reduction="sum"),
        "none": lambda i: loss(i, reduction="none"),
        "none_mean": lambda i: loss(i, reduction="none").mean(),
        "ignore_index": lambda i: loss(i, labels=i.labels.clamp(min=0), ignore_index=0),
        "class_weights": lambda i: loss(i, **{classes: i.classes}),
        "smoothing": lambda i: loss(i, label_smoothing=0.1),
        "weights_smoothing": lambda i: loss(i, label_smoothing=0.1, **{classes: i.classes}),
        "bias": lambda i: loss(i, **{bias: i.bias}),
        "tied": lambda i: loss(i, hidden=i.hidden + F.embedding(i.labels.clamp(min=0), i.weight)),
        "scale": lambda i: loss(i, hidden=i.hidden * 0.25),
        "shift_before": lambda i: loss(i, hidden=i.hidden[:, :-1], labels=i.labels[:, 1:]),
        "per_sequence": lambda i: _per_sequence(i, loss(i, reduction="none")),
        "divided": lambda i: loss(i, reduction="sum") / 77,
        "multiplied": lambda i: 0.125 * loss(i),
        "auxiliary": lambda i: loss(i) + 0.01 * i.hidden.square().mean(),
        "two_heads": lambda i: loss(i) + 0.5 * loss(i, head="second", labels=i.labels.roll(-1, 1)),
        "multi_token": lambda i: (
            loss(i, hidden=i.hidden[:, :-1], labels=i.labels[:, 1:])
            + 0.3 * loss(i, head="second", hidden=i.hidden[:, :-2], labels=i.labels[:, 2:])
        ),
        "value_head": lambda i: loss(i) + 0.5 * F.mse_loss(F.linear(i.hidden, i.value).squeeze(-1), i.advantage),
    }


def _per_sequence(i: Inputs, losses: Any) -> Any:
    counted = i.labels != -100
    return (losses.view(i.labels.shape).sum(1) / counted.sum(1)).mean()


# ------------------------------------------------------------------ Liger


def _liger(name: str, chunk: int | None) -> Run | None:
    """Its Triton kernels; on a CPU they run in Triton's interpreter (TRITON_INTERPRET=1)."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    def loss(
        i: Inputs, head: str = "weight", labels: Any = None, hidden: Any = None, bias: Any = None, **more: Any
    ) -> Any:
        rows = (i.hidden if hidden is None else hidden).flatten(0, 1)
        target = (i.labels if labels is None else labels).flatten()
        return LigerFusedLinearCrossEntropyLoss(**more)(getattr(i, head), rows, target, bias)

    forms = _forms(loss, bias="bias", classes="ce_weight")
    forms["softcap"] = lambda i: loss(i, softcap=30.0)
    forms["z_loss"] = lambda i: loss(i, lse_square_scale=1e-4)
    return forms.get(name)


_LIGER_TOLD = {
    "distill": "own function: LigerFusedLinearJSDLoss (beta 0), temperature included",
    "jensen_shannon": "own function: LigerFusedLinearJSDLoss",
    "dpo": "own function: LigerFusedLinearDPOLoss",
    "clipped_ratio": "own function: LigerFusedLinearGRPOLoss",
    "with_argmax": "own option: return_predicted_tokens",
    "with_metrics": "accuracy by return_token_accuracy, no entropy",
    "shift_after": "not as written; sliced hidden states",
}


# ------------------------------------------------------------------ cut cross-entropy


_CCE_TOLD = {
    **dict.fromkeys(
        ("mean", "sum", "none", "none_mean", "ignore_index", "tied", "divided", "multiplied", "auxiliary", "two_heads"),
        "an option of linear_cross_entropy, or around it",
    ),
    **dict.fromkeys(("softcap", "shift_before", "per_sequence", "multi_token", "value_head", "scale"), "expressible"),
    "shift_after": "own option: shift=True",
    "class_weights": "no option",
    "smoothing": "no option",
    "weights_smoothing": "no option",
}


def _nothing(name: str, chunk: int | None) -> None:
    return None


SYSTEMS: dict[str, System] = {
    "eager": System("eager", _eager),
    "mstc": System("mstc", _mstc),
    "mstc-aot": System("mstc", lambda name, chunk: _mstc(name, chunk, "aot_eager")),  # compiles in a moment
    "inductor": System("Inductor", _inductor),
    "auto_chunker": System("Inductor auto_chunker", _auto_chunker),
    "linear_ce": System("F.linear_cross_entropy", _linear_ce),
    "liger": System("Liger", _liger, "liger_kernel", _LIGER_TOLD),
    "cce": System("Cut Cross-Entropy (cited)", _nothing, "torch", _CCE_TOLD),
}
