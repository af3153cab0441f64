"""Floats that change from call to call: tensors where an op can read one, constants elsewhere; never a crash."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mstc
from testkit.exactness import chunked, gradient_errors, gradients_of, loops_of, lowered_graphs
from testkit.tiny import Tiny, inputs

Loss = Callable[[Tensor, float], Tensor]


def scaled(logits: Tensor, c: float) -> Tensor:
    return logits / c + c * logits.logsumexp(-1, keepdim=True)


def powers(logits: Tensor, c: float) -> Tensor:
    return (logits.exp() + 1) ** c + c ** (logits * 0.1) - c


def compared(logits: Tensor, c: float) -> Tensor:
    return torch.where(logits > c, logits, c).masked_fill(logits < -c, 1 - 2 * c).clamp(max=1 + c)


def rounded(logits: Tensor, c: float) -> Tensor:
    """The last factor has no dimension and keeps its precision."""
    return logits * (logits.detach().amax() * c).float()


def compiled(model: Tiny, between: Loss, lower: str = "eager") -> tuple[Loss, Callable[..., Tensor]]:
    x, labels = inputs()

    def loss(_: Tensor, c: float) -> Tensor:
        return F.cross_entropy(between(model(x), c).flatten(0, 1), labels.flatten()) + c * model(x).square().mean()

    return loss, torch.compile(loss, backend="mstc", fullgraph=True, options=chunked(7, 5, lower))


@pytest.mark.parametrize("between", [scaled, powers, compared, rounded])
def test_one_graph_for_all_values(between: Loss) -> None:
    torch._dynamo.reset()
    mstc.clear_reports()
    model = Tiny()
    leaves = dict(model.named_parameters())
    # AOTAutograd, too, may ask for constants.
    loss, run = compiled(model, between, "aot_eager" if between is scaled else "eager")
    with lowered_graphs() as graphs:
        for c in (0.5, 0.75, 1.25, 0.375):
            (value, expected), (other, got) = (gradients_of(f, leaves, (leaves, c)) for f in (loss, run))
            torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-9)
            assert max(gradient_errors(got, expected).values()) < 1e-9
    assert len(graphs) == 2, "one for the first value, one for all others"
    assert len(loops_of(graphs[1])) == len(loops_of(graphs[0])) > 0


def test_a_float_that_no_tensor_can_stand_for() -> None:
    """The slope of leaky_relu: each value is a constant of a graph of its own."""
    torch._dynamo.reset()
    mstc.clear_reports()
    model = Tiny()
    leaves = dict(model.named_parameters())
    loss, run = compiled(model, lambda logits, c: F.leaky_relu(logits, c))
    with lowered_graphs() as graphs:
        for c in (0.5, 0.25, 0.125):
            (value, expected), (other, got) = (gradients_of(f, leaves, (leaves, c)) for f in (loss, run))
            torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-9)
            assert max(gradient_errors(got, expected).values()) < 1e-9
    assert all(len(loops_of(gm)) == len(loops_of(graphs[0])) > 0 for gm in graphs)


def test_everything_dynamic() -> None:
    """Under ``dynamic=True`` the numbers of modules (eps, a scale) come as floats that may change."""
    torch._dynamo.reset()

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.eps, self.scale = Tiny(), 1e-6, 0.3

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
            logits = self.model(F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=self.scale))
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    module = Scaled()
    leaves = dict(module.named_parameters())
    run = torch.compile(module, backend="mstc", dynamic=True, fullgraph=True, options=chunked(7, 5, "eager"))
    with lowered_graphs() as graphs:
        for length in (23, 31):
            (value, expected), (other, got) = (gradients_of(f, leaves, inputs(length=length)) for f in (module, run))
            torch.testing.assert_close(other, value, rtol=1e-9, atol=1e-9)
            assert max(gradient_errors(got, expected).values()) < 1e-9
    assert len(graphs) == 1 and loops_of(graphs[0])
