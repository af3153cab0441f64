"""Every class under PyTorch's modes: autocast, forward-mode AD, vmap, inference mode, many lengths, one gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mstc.kernels import KernelArgumentError
from mstc.kernels.bench_cases import CLASSES, SCAN, Form, Sizes, case

ALL = [*CLASSES, SCAN]
WITH_STATE = [name for name in ALL if name != "window 512"]


def small(name: str, tokens: int = 70) -> tuple[Form, list[Tensor]]:
    return case(name, Sizes(tokens, heads=2, width=8, channels=12, columns=4))


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def bfloat(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.dtype == torch.float32 else tensor


@pytest.mark.parametrize("name", ALL)
def test_a_backward_inside_autocast_is_the_one_outside(name: str) -> None:
    form, tensors = small(name)
    inputs = leaves(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        out = form(*inputs)
        inside = torch.autograd.grad(out.float().sum(), inputs, retain_graph=True)
    outside = torch.autograd.grad(out.float().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", WITH_STATE)
def test_one_token_under_autocast_is_cast_as_many_are(name: str, compiled: bool) -> None:
    torch._dynamo.reset()
    form, tensors = small(name, tokens=1)
    many, longer = small(name, tokens=2)
    called = torch.compile(form, backend="eager", fullgraph=True) if compiled else form
    with torch.autocast("cpu", torch.bfloat16):
        got, wanted = called(*tensors), many(*longer)
    assert got.dtype == wanted.dtype
    cast = {SCAN: 0, "dplr": 5}.get(name, 3)
    low = [bfloat(t) if i < cast else t for i, t in enumerate(tensors)]
    assert torch.equal(got, form(*low))


@pytest.mark.parametrize("name", ALL)
def test_forward_mode_is_refused(name: str) -> None:
    """The op would drop the tangents, and the result's would be 0."""
    form, (first, *rest) = small(name)
    with pytest.raises(KernelArgumentError, match="forward-mode AD"):
        torch.func.jvp(lambda x: form(x, *rest), (first,), (first,))


@pytest.mark.parametrize("name", ALL)
def test_vmap_is_one_call_after_another(name: str) -> None:
    form, tensors = small(name)
    doubled = [torch.stack([t, t * 0.5]) for t in tensors]
    got = torch.func.vmap(lambda *args: form(*args))(*doubled)
    assert torch.equal(got, torch.stack([form(*tensors), form(*(t * 0.5 for t in tensors))]))


@pytest.mark.parametrize("name", ALL)
def test_inference_mode_and_gradients_of_one_input_alone(name: str) -> None:
    form, tensors = small(name)
    inputs = leaves(tensors)
    wanted = form(*inputs)
    with torch.inference_mode():
        assert torch.equal(form(*(t.clone() for t in tensors)), wanted)
    for i, grad in enumerate(torch.autograd.grad(wanted.sum(), inputs)):
        only = [t.detach().clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
        assert torch.equal(torch.autograd.grad(form(*only).sum(), only[i])[0], grad)


@pytest.mark.parametrize("name", ALL)
def test_one_graph_for_all_lengths(name: str, uncompiled: list[Any]) -> None:
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: object) -> Any:
        graphs.append(gm)
        return gm

    form, _ = small(name)
    compiled = torch.compile(form, backend=backend, fullgraph=True)
    for tokens in (70, 130, 600):
        _, tensors = small(name, tokens)
        for tensor in tensors:
            if tensor.dim() > 2:
                torch._dynamo.mark_dynamic(tensor, 1)
        torch.testing.assert_close(compiled(*tensors), form(*tensors), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
