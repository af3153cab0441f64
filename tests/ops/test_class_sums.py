"""Gradients of log-softmax with known sums over classes: the same numbers, and no sum is left in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mstc import compat
from mstc.ops.class_sums import use_class_sums

aten = torch.ops.aten
TARGETS = torch.tensor([1, 2, 99, 3, 0, 6])
WEIGHTS = torch.rand(7, generator=torch.Generator().manual_seed(1))
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weight": WEIGHTS},
    "a class ignored": {"ignore_index": 3},
    "label smoothing": {"label_smoothing": 0.1},
    "smoothing and weights": {"label_smoothing": 0.1, "weight": WEIGHTS},
}
KEPT: dict[str, dict[str, Any]] = {
    "mean": {"reduction": "mean"},
}


def gradient(options: dict[str, Any]) -> Any:
    def run(logits: Tensor, gradient: Tensor) -> list[Tensor]:
        given = {k: v.to(logits.dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
        with torch.enable_grad():
            x = logits.detach().requires_grad_()
            targets = TARGETS.clamp(max=6) if "ignore_index" in options else TARGETS
            losses = F.cross_entropy(x, targets, **{"reduction": "none", "ignore_index": 99, **given})
            return list(torch.autograd.grad(losses, x, gradient.expand_as(losses)))

    return run


def rewritten(run: Any, logits: Tensor, given: Tensor) -> torch.fx.GraphModule:
    mode = compat.FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) for x in (logits, given)]
    with compat.isolated_tracing(mode), torch.no_grad():
        gm = compat.trace_flat(run, fakes)
    use_class_sums(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_same_numbers_without_the_sum(options: dict[str, Any], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, given = torch.randn(6, 7, generator=generator).to(dtype), torch.randn(6, generator=generator).to(dtype)
    run = gradient(options)
    gm = rewritten(run, logits, given)
    assert not gm.graph.find_nodes(op="call_function", target=aten._log_softmax_backward_data.default)
    found, expected = gm(logits, given)[0], run(logits, given)[0]
    assert found.dtype == expected.dtype == dtype
    bound = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
    noted = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert all("val" in n.meta for n in noted)


@pytest.mark.parametrize("options", KEPT.values(), ids=KEPT)
def test_other_gradients_stay(options: dict[str, Any]) -> None:
    given = torch.randn(()) if "reduction" in options else torch.randn(6)
    gm = rewritten(gradient(options), torch.randn(6, 7), given)
    assert gm.graph.find_nodes(op="call_function", target=aten._log_softmax_backward_data.default)


def picked(logits: Tensor, gradient: Tensor) -> list[Tensor]:
    """Log-probabilities of one class per row, as people pick them."""
    with torch.enable_grad():
        x = logits.detach().requires_grad_()
        chosen = x.log_softmax(-1).gather(-1, TARGETS.clamp(max=6).unsqueeze(-1)).squeeze(-1)
        return list(torch.autograd.grad(chosen, x, gradient))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_picked_classes_need_no_buffer_and_no_sum(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, given = torch.randn(6, 7, generator=generator).to(dtype), torch.randn(6, generator=generator).to(dtype)
    gm = rewritten(picked, logits, given)
    for target in (aten._log_softmax_backward_data.default, aten.scatter_add.default):
        assert not gm.graph.find_nodes(op="call_function", target=target)
    (expected,), (found,) = picked(logits, given), gm(logits, given)
    torch.testing.assert_close(found, expected)


def test_several_entries_per_row_stay() -> None:
    def twice(logits: Tensor, gradient: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            x = logits.detach().requires_grad_()
            two = x.log_softmax(-1).gather(-1, torch.stack([TARGETS.clamp(max=6), TARGETS.clamp(max=5)], -1))
            return list(torch.autograd.grad(two.sum(-1), x, gradient))

    logits, given = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    gm = rewritten(twice, logits, given)
    assert gm.graph.find_nodes(op="call_function", target=aten.scatter_add.default)
    torch.testing.assert_close(gm(logits, given), twice(logits, given))


def test_a_comparison_of_the_programs_own_is_not_taken_for_a_picked_class() -> None:
    """Its index may be no class at all: then nothing is let through."""

    def compared(logits: Tensor, gradient: Tensor) -> list[Tensor]:
        one = torch.arange(7) == TARGETS.unsqueeze(-1)  # one of the targets is no class
        dy = torch.where(one, gradient.unsqueeze(-1), 0.0)
        return [aten._log_softmax_backward_data(dy, logits.log_softmax(-1), -1, logits.dtype)]

    logits, given = torch.randn(6, 7, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    gm = rewritten(compared, logits, given)
    torch.testing.assert_close(gm(logits, given), compared(logits, given))
