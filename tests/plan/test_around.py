"""What runs the graph around the loops: a compiler only where it has something to gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mstc
from mstc.plan import around
from testkit.exactness import chunked, compare
from testkit.float64 import true_float64
from testkit.hf_models import causal, tokens


def _llama(**settings: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The model of the benchmark, on the meta device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1792,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        **settings,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
        ids = torch.zeros(1, 8192, dtype=torch.long)
    return lambda x: model(input_ids=x, labels=x, use_cache=False).loss, ids


def test_loops_and_attention_leave_nothing_to_fuse() -> None:
    step, ids = _llama()
    report = mstc.explain(step, ids)
    assert report.around == "aot_eager"
    assert "around the loops: aot_eager" in report.to_text()
    assert mstc.Report.from_json(report.to_json()).around == "aot_eager"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"mini_sequence": False, "lm_head": False}, "without loops"),
        ({"mini_sequence": False}, "where most of the model stays outside them"),
    ],
)
def test_what_is_left_is_fused(options: dict[str, Any], why: str) -> None:
    step, ids = _llama()
    assert mstc.explain(step, ids, options=options).around == "", why


def test_random_ops_outside_are_the_compilers() -> None:
    step, ids = _llama(attention_dropout=0.1)
    assert mstc.explain(step, ids).around == ""


def test_small_models_are_compiled_whole() -> None:
    """Little work per token: what stands around the loops counts."""
    model, ids = causal("llama"), tokens()
    report = mstc.explain(lambda x: model(input_ids=x, labels=x).loss, ids, options=chunked(lower="inductor"))
    assert any("chunks" in e.what for e in report.edits)
    assert report.around == ""


@pytest.mark.inductor
@pytest.mark.parametrize("dynamic", [pytest.param(False, marks=pytest.mark.slow), True])
def test_bodies_through_inductor_in_a_graph_op_by_op(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(around, "FLOPS_PER_BYTE", 0)
    monkeypatch.setattr(around, "PART_OF_HELD", float("inf"))
    model, ids = causal("llama"), tokens()
    if dynamic:
        torch._dynamo.mark_dynamic(ids, 1)
    with true_float64():
        found = compare(
            lambda x: model(input_ids=x, labels=x).loss,
            dict(model.named_parameters()),
            [ids],
            chunked(lower="inductor"),
        )
    found.check()
    assert [r.around for r in found.reports] == ["aot_eager"]
    assert found.loops >= 5
