"""Models with other heads than a language model's, and of other kinds: exact, with loops where there are tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from testkit.exactness import chunked, compare
from testkit.float64 import true_float64
from testkit.hf_models import config_of, from_auto, tokens

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "use_cache": False,
    "pad_token_id": 0,
}
_BERT = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "use_cache")}
_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _whole(below: int, *shape: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(0))


class EncoderDecoder(nn.Module):
    """`nn.Transformer` with a head."""

    def __init__(self, width: int = 32, classes: int = 96) -> None:
        super().__init__()
        self.table = nn.Embedding(classes, width)
        self.body = nn.Transformer(width, 4, 1, 1, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], dtype=self.head.weight.dtype)
        out = self.body(self.table(source), self.table(target), tgt_mask=mask, tgt_is_causal=True)
        return F.cross_entropy(self.head(out[:, :-1]).flatten(0, 1), target[:, 1:].flatten())


class ConvolutionAndRecurrence(nn.Module):
    """A strided convolution, a GRU over time, an MLP and a head per step."""

    def __init__(self, width: int = 32, classes: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, width, 5, stride=2, padding=2)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 64), nn.SiLU(), nn.Linear(64, width))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        h, _ = self.gru(F.gelu(self.conv(x.transpose(1, 2))).transpose(1, 2))
        return F.cross_entropy(self.head(h + self.mlp(h)).flatten(0, 1), labels.flatten())


class PickedRows(nn.Module):
    """A masked language model's head on a fixed number of picked positions."""

    def __init__(self, width: int = 32, classes: int = 96) -> None:
        super().__init__()
        self.table, self.mlp = nn.Embedding(classes, width), nn.Sequential(nn.Linear(width, 64), nn.GELU())
        self.out, self.head = nn.Linear(64, width), nn.Linear(width, classes)

    def forward(self, ids: Tensor, picked: Tensor) -> Tensor:
        h = self.table(ids)
        h = h + self.out(self.mlp(h))
        rows = h.gather(1, picked.unsqueeze(-1).expand(-1, -1, h.shape[-1]))
        return F.cross_entropy(self.head(rows).flatten(0, 1), ids.gather(1, picked).flatten())


@dataclass(frozen=True)
class Task:
    """make: the model; keywords and inputs: of its call; loops: at least so many."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    loops: int
    keywords: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()


def _auto(auto: str, kind: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: from_auto(auto, kind, **settings)


def _clip() -> nn.Module:
    from transformers import CLIPModel

    torch.manual_seed(0)
    text = {**_TOWER, "vocab_size": 96, "max_position_embeddings": 50, "eos_token_id": 2}
    vision = {**_TOWER, "image_size": 32, "patch_size": 4}
    return CLIPModel(config_of("clip", text_config=text, vision_config=vision, projection_dim=16))


_WHISPER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 96,
    "num_mel_bins": 8,
    "max_source_positions": 40,
    "max_target_positions": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
    "use_cache": False,
}

TASKS: dict[str, Task] = {
    "token classification": Task(
        _auto("AutoModelForTokenClassification", "bert", num_labels=5, **_BERT),
        lambda: (tokens(), _whole(5, 2, 50)),
        3,
        ("input_ids", "labels"),
    ),
    "question answering": Task(
        _auto("AutoModelForQuestionAnswering", "bert", **_BERT),
        lambda: (tokens(), _whole(50, 2), _whole(50, 2)),
        3,
        ("input_ids", "start_positions", "end_positions"),
    ),
    "reward model": Task(
        _auto("AutoModelForSequenceClassification", "llama", num_labels=1, **_LLAMA),
        lambda: (tokens(), _floats(2)),
        3,
        ("input_ids", "labels"),
    ),
    "clip": Task(
        _clip,
        lambda: (tokens(3, 50), _floats(3, 3, 32, 32)),
        2,
        ("input_ids", "pixel_values"),
        (("return_loss", True),),
    ),
    "whisper": Task(
        _auto("AutoModelForSpeechSeq2Seq", "whisper", **_WHISPER),
        lambda: (_floats(2, 8, 80), tokens(2, 30)),
        4,
        ("input_features", "labels"),
    ),
    "experts with a balancing loss": Task(
        _auto("AutoModelForCausalLM", "mixtral", num_local_experts=4, output_router_logits=True, **_LLAMA),
        lambda: (tokens(), tokens()),
        4,
        ("input_ids", "labels"),
    ),
    "nn.Transformer": Task(EncoderDecoder, lambda: (tokens(2, 40), tokens(2, 50)), 3),
    "convolution and recurrence": Task(ConvolutionAndRecurrence, lambda: (_floats(2, 100, 8), _whole(7, 2, 50)), 1),
    "picked rows": Task(PickedRows, lambda: (tokens(), _whole(50, 2, 9)), 1),
}
QUICK = ("token classification", "nn.Transformer", "picked rows")


def _call(model: nn.Module, task: Task) -> Any:
    if not task.keywords:
        return model

    def loss(*inputs: Tensor) -> Tensor:
        return model(**dict(zip(task.keywords, inputs, strict=True)), **dict(task.settings)).loss  # type: ignore[no-any-return]

    return loss


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TASKS])
def test_exact_and_in_loops(name: str) -> None:
    task = TASKS[name]
    torch.manual_seed(0)
    model = task.make().double().train()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    with true_float64():
        result = compare(_call(model, task), dict(model.named_parameters()), task.inputs(), chunked())
    print(result.describe())
    result.check()
    assert result.loops >= task.loops
