"""What the report calls regions and mixers: by structure, per layer, with the user's source lines."""

from __future__ import annotations

import linecache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mstc
from testkit.exactness import chunked
from testkit.hf_models import SMALL, causal, from_auto, tokens

Row = tuple[str, str]

NORM_QKV = ("region", "norm + q/k/v projection")
CAUSAL = ("mixer", "attention (causal)")
OUT_MLP = ("region", "output projection + norm + MLP")
OUT_GATED = ("region", "output projection + norm + gated MLP")
HEAD = ("region", "norm + LM head + cross-entropy loss")


def explained(model: nn.Module, **options: Any) -> mstc.Report:
    torch._dynamo.reset()
    ids = tokens()
    return mstc.explain(lambda: model(input_ids=ids, labels=ids).loss, options=chunked(lower="eager", **options))


def by_layer(report: mstc.Report) -> dict[int | None, list[Row]]:
    found: dict[int | None, list[Row]] = {}
    for r in report.regions:
        found.setdefault(r.layer, []).append((r.kind, r.label))
    return found


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("llama", [NORM_QKV, CAUSAL, OUT_GATED]),
        ("gpt2", [NORM_QKV, CAUSAL, OUT_MLP]),
        ("mistral", [NORM_QKV, ("mixer", "attention (causal, window 16)"), OUT_GATED]),
        ("qwen3", [("region", "norms + q/k/v projection"), CAUSAL, OUT_GATED]),
        ("phi3", [NORM_QKV, CAUSAL, OUT_GATED]),
        (
            "mixtral",
            [
                NORM_QKV,
                CAUSAL,
                ("region", "output projection"),
                ("region", "norm + router"),
                ("mixer", "experts"),
            ],
        ),
    ],
)
def test_every_layer_of_a_model(kind: str, layer: list[Row]) -> None:
    model = causal(kind, torch.float32)
    if kind == "mixtral":
        model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    assert by_layer(explained(model)) == {0: layer, 1: layer, None: [HEAD]}


def test_experts_whose_weights_are_gathered() -> None:
    model = causal("mixtral", torch.float32)
    model.set_experts_implementation("batched_mm")  # type: ignore[operator]
    layer = [NORM_QKV, CAUSAL, ("region", "output projection + norm + router"), ("region", "experts")]
    assert by_layer(explained(model)) == {0: layer, 1: layer, None: [HEAD]}


@pytest.mark.parametrize("chunks", [10, 1000])
def test_written_out_attention(chunks: int) -> None:
    """In chunks of queries or left whole: its kind of mask, and the projections around it."""
    found = by_layer(explained(causal("gemma2", torch.float32), query_chunks={"chunk_tokens": chunks}))
    kind, what = ("region", "attention by queries") if chunks == 10 else ("mixer", "attention")
    after = ("region", "output projection + norms + gated MLP")
    assert found[0] == [NORM_QKV, (kind, f"{what} (causal, window 16)"), after]
    assert found[1] == [NORM_QKV, (kind, f"{what} (causal)"), after]


def test_rows_that_a_mask_chooses_are_no_experts() -> None:
    report = mstc.explain(lambda x, keep: x[keep].sin().sum(), torch.randn(2, 3, 4), torch.ones(2, 3).bool())
    assert not any("experts" in found.label for found in report.regions)


def test_an_encoder() -> None:
    found = by_layer(explained(from_auto("AutoModelForMaskedLM", "bert", torch.float32, **SMALL)))
    assert [row for rows in found.values() for row in rows if row[0] == "mixer"] == [
        ("mixer", "attention (no mask)")
    ] * 2
    assert ("region", "output projection + norms + MLP") in found[0]


def test_an_mlp_in_the_loop_of_a_head_is_told() -> None:
    """Where no pass parts them."""
    model = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8), nn.LayerNorm(8), nn.Linear(8, 11))
    x, labels = torch.randn(2, 50, 8), torch.randint(0, 11, (2, 50))
    report = mstc.explain(lambda: F.cross_entropy(model(x).mT, labels), options={"lower": "eager"})
    assert [r.label for r in report.regions] == ["norm + MLP + LM head + cross-entropy loss"]


class Nameless(nn.Module):
    """Names that say nothing, and that say something else."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head, self.router, self.k = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)
        self.mlp, self.norm = nn.Linear(8, 24), nn.Linear(8, 8)
        self.gate = nn.Linear(8, 11)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        q, k, v = self.mlp(x).chunk(3, -1)
        x = x + self.norm(F.scaled_dot_product_attention(q, k, v))
        x = x + self.k(F.silu(self.lm_head(x)) * self.router(x))
        return F.cross_entropy(self.gate(x).flatten(0, 1), labels.flatten())


def test_names_of_modules_play_no_part() -> None:
    x, labels = torch.randn(2, 50, 8), torch.randint(0, 11, (2, 50))
    report = mstc.explain(Nameless(), x, labels, options=chunked(lower="eager"))
    assert [r.label for r in report.regions] == [
        "q/k/v projection",
        "attention (no mask)",
        "output projection + gated MLP",
        "LM head + cross-entropy loss",
    ]
    lines = [linecache.getline(path, int(line)) for path, line in (r.source.rsplit(":", 1) for r in report.regions)]
    for line, call in zip(lines, ("self.mlp", "scaled_dot", "self.norm", "self.gate"), strict=True):
        assert call in line
