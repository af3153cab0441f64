"""Writes to detached tensors: gradients to what is written, as in eager, or a refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mstc

Fn = Callable[[Tensor, Tensor], Tensor]


def added(x: Tensor, w: Tensor) -> Tensor:
    p = (x * w).detach()
    p += w
    return p.square().sum()


def partly(x: Tensor, w: Tensor) -> Tensor:
    p = (x * w).detach()
    p[1:] = w * 3
    p.view(-1)[:2].mul_(2)
    return (p * w).square().sum()


def of_data(x: Tensor, w: Tensor) -> Tensor:
    p = (x * w).data
    p.mul_(w.sum())
    return p.square().sum()


def straight_through(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    return (y + (y.round() - y).data).square().sum()


def read_before(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    aside = y.sum()
    p = y.detach()
    p.add_(w)
    return p.square().sum() + aside


def read_after(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    p = y.detach()
    p.add_(w)
    return p.square().sum() + y.sum()


def without_gradients(x: Tensor, w: Tensor) -> Tensor:
    p = x.sin().detach()
    p.mul_(2)
    return (p * w).sum()


@pytest.mark.parametrize("fn", [added, partly, of_data, straight_through, read_before, read_after, without_gradients])
@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_writes_to_detached_tensors(fn: Fn, lower: str) -> None:
    x, w = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    torch._dynamo.reset()
    mstc.clear_reports()
    got = fn_and_gradient(torch.compile(fn, backend="mstc", options={"lower": lower}), x, w)
    torch.testing.assert_close(got, fn_and_gradient(fn, x, w))
    refused = [r.reason for r in mstc.reports()[0].refusals if r.pass_name == "normal_form"]
    assert [("detached" in r) for r in refused] == ([True] if fn is read_after else [])


def sharpened(x: Tensor, w: Tensor) -> Tensor:
    slope = torch.func.grad(lambda v: (x * v).sin().square().sum())(w.detach())
    return (x * (w + 0.1 * slope)).sin().square().sum()


def test_a_detached_tensor_under_a_transform_has_no_memory_to_look_at() -> None:
    x, w = torch.randn(4, 8), torch.randn(8, requires_grad=True)
    torch._dynamo.reset()
    mstc.clear_reports()
    got = fn_and_gradient(torch.compile(sharpened, backend="mstc", options={"lower": "aot_eager"}), x, w)
    torch.testing.assert_close(got, fn_and_gradient(sharpened, x, w))
    assert any("function transform" in r.reason for r in mstc.reports()[0].refusals)


def fn_and_gradient(fn: Fn, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    loss = fn(x, w)
    return loss.detach(), torch.autograd.grad(loss, w)[0]
