"""Hooks on the gradients of activations, registered inside the function: eager's numbers, and loops around them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mstc
from testkit.exactness import Comparison, chunked, compare, gradient_errors, gradients_of
from testkit.tiny import Loss, Tiny, inputs, mean_loss
from testkit.versions import NEEDS_HOOKS

pytestmark = NEEDS_HOOKS

INDUCTOR = pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])


def compared(model: Tiny, fn: Loss, lower: str = "aot_eager") -> Comparison:
    result = compare(fn, dict(model.named_parameters()), inputs(), chunked(7, 5, lower))
    print(result.describe())
    result.check()
    assert len(result.graphs) == 1
    return result


@pytest.mark.parametrize("lower", ["eager", "aot_eager", INDUCTOR])
def test_a_hook_sees_the_gradients_of_all_readers(lower: str) -> None:
    """Also of one before the registration; several run in order, and not one of them is linear."""
    model = Tiny()

    def run(x: Tensor, labels: Tensor) -> Tensor:
        h = model.features(x)
        early = h.square().mean()
        h.register_hook(lambda g: g / g.norm())
        late = h.exp().mean()
        h.register_hook(lambda g: g.clamp(-0.02, 0.02))
        return mean_loss(model.head(h), labels) + early + late

    assert compared(model, run, lower).loops == 3


def test_hooks_that_read_values() -> None:
    """Another input, a mask made of the tensor itself, and the tensor."""
    model = Tiny()

    def run(x: Tensor, labels: Tensor) -> Tensor:
        h = model.features(x)
        positive = h > 0
        h.register_hook(lambda g: g * positive + h * x.mean())
        return mean_loss(model.head(h), labels)

    assert compared(model, run).loops == 3


def test_dynamic_lengths() -> None:
    """Dynamo hands the lengths to the hook."""
    model = Tiny()

    def run(x: Tensor, labels: Tensor) -> Tensor:
        h = model.features(x)
        h.register_hook(lambda g: g * g.shape[1])
        return mean_loss(model.head(h), labels)

    leaves = dict(model.named_parameters())
    torch._dynamo.reset()
    mstc.clear_reports()
    fast = torch.compile(run, backend="mstc", options=chunked(7, 5), dynamic=True)
    for length in (23, 31):
        _, expected = gradients_of(run, leaves, inputs(length=length))
        _, got = gradients_of(fast, leaves, inputs(length=length))
        assert max(gradient_errors(got, expected).values()) <= 1e-9
    (report,) = mstc.reports()
    assert not report.refusals and any("chunks" in e.what for e in report.edits)


def test_a_hook_that_does_nothing_parts_no_region() -> None:
    """A check that is settled while tracing, on the logits, as Lightning's Fabric registers one."""
    model = Tiny()

    def run(x: Tensor, labels: Tensor) -> Tensor:
        logits = model(x)
        logits.register_hook(lambda g: None)
        return mean_loss(logits, labels)

    result = compared(model, run)
    assert result.loops == 3
    assert any(str(n.target).startswith("mstc.loss_loop") for n in result.graphs[0].graph.nodes)


@pytest.mark.parametrize("kind", ["read", "written"])
def test_stays(kind: str) -> None:
    """Right, and left as it came: a hook reads what is made of the tensor with a gradient; the tensor is written to."""
    model = Tiny()

    def run(x: Tensor, labels: Tensor) -> Tensor:
        h = model.features(x)
        gate = h.sigmoid()
        h.register_hook(lambda g: g * gate if kind == "read" else 3 * g)
        if kind == "written":
            h.mul_(2)
        return mean_loss(model.head(h), labels) + gate.mean()

    result = compared(model, run)
    assert result.loops == 0 and "register_hook" in result.reports[0].refusals[0].reason
