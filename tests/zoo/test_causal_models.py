"""Hugging Face causal models, unpatched: loss and every gradient, and every layer's products in loops."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mstc.report import RegionInfo
from testkit.exactness import Comparison, chunked, compare, products_outside
from testkit.float64 import true_float64
from testkit.hf_models import CAUSAL, EXPERTS, causal, tokens
from testkit.versions import NEEDS_FLOAT64_ATTENTION, NEEDS_SCANS


def loss_of(model: nn.Module) -> Any:
    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    return loss


def compared(model: nn.Module, options: dict[str, Any] | None = None) -> Comparison:
    return compare(loss_of(model), dict(model.named_parameters()), (tokens(),), options)


def check_loops(result: Comparison) -> None:
    """One graph, each layer's products with weights in loops, and the head's: nothing left out or refused."""
    print(result.describe())
    assert len(result.reports) == len(result.graphs) == 1, "the model compiles as one graph"
    assert not products_outside(result.graphs[0])
    # Of two layers: q/k/v of the first, what lies between the two attentions, what follows the last; the head.
    assert result.loops >= 4
    refused = [r for r in result.reports[0].refusals if r.pass_name in ("mini_sequence", "lm_head", "normal_form")]
    assert not refused
    check_labels(result.reports[0].regions)


def check_labels(regions: list[RegionInfo]) -> None:
    """What two layers and a head consist of, told by structure, with source lines.

    A loop may hold what ends one layer and begins the next: it is told for the first one.
    """
    attention = [r for r in regions if "attention" in r.label]
    assert [r.layer for r in attention] == [0, 1] and all("(causal" in r.label for r in attention)
    for part in ("q/k/v projection", "output projection", "MLP|experts"):
        assert sum(any(word in r.label for word in part.split("|")) for r in regions) >= 2, part
    assert regions[-1].label.endswith("LM head + cross-entropy loss")
    assert all(re.search(r"\.py:\d+$", r.source) for r in regions)


@pytest.mark.parametrize("kind", CAUSAL)
def test_exact_and_in_loops(kind: str) -> None:
    with true_float64():
        result = compared(causal(kind))
    result.check()
    check_loops(result)


def test_an_activation_of_its_own_gradient() -> None:
    """Bloom's is an autograd.Function: one op, with loops on both sides of it."""
    with true_float64():
        result = compared(causal("bloom", n_layer=2, n_head=4))
    result.check()
    assert result.loops >= 4
    assert not [r for r in result.reports[0].refusals if r.pass_name == "normal_form"]


@NEEDS_SCANS
def test_a_scan_under_vmap() -> None:
    """Mamba's is an associative scan, which Dynamo writes with vmap: projections, norms and the head are in loops."""
    with true_float64():
        result = compared(causal("mamba", state_size=8, time_step_rank=4, conv_kernel=2))
    result.check()
    assert result.loops >= 4
    # Its slices over time are none of logits, and not refused as such.
    assert {r.pass_name for r in result.reports[0].refusals} <= {"mini_sequence"}


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_as_batched_products_are_exact(kind: str) -> None:
    with true_float64():
        model = causal(kind)
        model.set_experts_implementation("batched_mm")  # type: ignore[operator]
        result = compared(model)
    result.check()
    check_loops(result)


def choices(model: nn.Module, run: Any, ids: Tensor, top: int) -> list[Tensor]:
    """The experts that each layer's router picks for each token."""
    with torch.no_grad():
        found = run(input_ids=ids, output_router_logits=True).router_logits
    return [r.reshape(ids.numel(), -1).topk(top, -1).indices.sort(-1).values for r in found]


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_as_grouped_products_in_float32(kind: str) -> None:
    """`grouped_mm` has no float64. A flipped choice of experts would be no rounding error, so flips are counted."""
    model = causal(kind, torch.float32)
    model.set_experts_implementation("grouped_mm")  # type: ignore[operator]
    result = compared(model)
    eager = choices(model, model, tokens(), 2)
    compiled = choices(model, torch.compile(model, backend="mstc", options=chunked()), tokens(), 2)
    flips = sum(int((a != b).any(-1).sum()) for a, b in zip(eager, compiled, strict=True))
    print(f"{flips} of {len(eager) * tokens().numel()} choices flipped")
    assert flips == 0, "another seed is needed for a comparison with the routing held fixed"
    result.check(torch.float32)
    check_loops(result)


@NEEDS_FLOAT64_ATTENTION
@pytest.mark.parametrize("kind", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
@pytest.mark.inductor
def test_exact_through_inductor(kind: str) -> None:
    with true_float64():
        result = compared(causal(kind), chunked(lower="inductor"))
    result.check()
    check_loops(result)


@pytest.mark.parametrize("wanted", ["hidden", "vocabulary", "heads"])
def test_lengths_that_equal_other_sizes(wanted: str) -> None:
    """S is found by how it flows, not by its value."""
    length = {"hidden": 32, "vocabulary": 96, "heads": 4}[wanted]
    model = causal("llama")
    with true_float64():
        result = compare(loss_of(model), dict(model.named_parameters()), (tokens(2, length),), chunked(7, 5, "eager"))
    result.check()
    check_loops(result)
