"""A `torch.autograd.Function` in the graph: its own backward counts, and everything around it is treated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mstc
from testkit.exactness import chunked, compare
from testkit.versions import BEFORE_2_13


class Scaled(torch.autograd.Function):
    """A gradient that is three times the derivative, and a constant argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale = scale
        return torch.tanh(x) * scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * g * (1 - torch.tanh(x) ** 2) * ctx.scale, None


class Two(torch.autograd.Function):
    """Two results, of which the second has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Any:
        ctx.save_for_backward(x, y)
        order = (x > y).to(x.dtype)
        ctx.mark_non_differentiable(order)
        return x * y, order

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Any:
        x, y = ctx.saved_tensors
        return g * y, 2 * g * x


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def leaves() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"up": (8, 24), "down": (24, 8), "head": (8, 32)}
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}


def arguments() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 23, 8, generator=generator, dtype=torch.float64), torch.randint(
        32, (2, 23), generator=generator
    )


def program(up: Tensor, down: Tensor, head: Tensor, *, inner: Any, saving: bool = False) -> Any:
    def block(x: Tensor) -> Tensor:
        return x + inner(x @ up) @ down

    def run(x: Tensor, labels: Tensor) -> Tensor:
        x = checkpoint(block, x, use_reentrant=False) if saving else block(x)
        x = x + F.scaled_dot_product_attention(x, x, x, is_causal=True)
        x = x + F.silu(x @ up) @ down
        return F.cross_entropy((x @ head).flatten(0, 1), labels.flatten())

    return run


def scaled(x: Tensor) -> Tensor:
    return Scaled.apply(x, 0.5)  # type: ignore[no-any-return, no-untyped-call]


def two(x: Tensor) -> Tensor:
    product, order = Two.apply(x, x + 1)  # type: ignore[no-untyped-call]
    return product + order * x  # type: ignore[no-any-return]


@pytest.mark.parametrize("saving", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize("inner", [scaled, two])
@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_its_own_gradient_and_loops_around_it(lower: str, inner: Any, saving: bool) -> None:
    given = leaves()
    result = compare(program(**given, inner=inner, saving=saving), given, arguments(), chunked(7, 5, lower))
    result.check()
    report = mstc.reports()[-1]
    assert len([r for r in report.regions if r.loop]) >= 3 and not report.refusals


@pytest.mark.inductor
def test_through_inductor() -> None:
    given = leaves()
    compare(program(**given, inner=scaled), given, arguments(), chunked(7, 5, "inductor")).check()


def norms(x: Tensor) -> Tensor:
    """vmap in vmap, over another dimension each."""
    each = torch.vmap(torch.vmap(lambda row: row * row.sum(), in_dims=0), in_dims=1, out_dims=1)
    return each(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_a_stretch_under_vmap_and_loops_around_it(lower: str) -> None:
    given = leaves()
    mstc.clear_reports()
    compare(program(**given, inner=norms), given, arguments(), chunked(7, 5, lower)).check()
    (report,) = mstc.reports()
    assert len([r for r in report.regions if r.loop]) >= 3 and not report.refusals


def test_another_transform_leaves_the_graph_as_it_is() -> None:
    given = leaves()
    run = program(**given, inner=lambda x: torch.func.grad(lambda y: y.tanh().sum())(x))
    compare(run, given, arguments(), chunked(7, 5, "eager")).check()
    assert "function transform" in mstc.reports()[-1].refusals[0].reason


def test_one_that_changes_its_input_breaks_the_graph() -> None:
    """Dynamo runs it between two graphs; before torch 2.13 it keeps one."""
    given = leaves()
    run = program(**given, inner=lambda x: InPlace.apply(x.clone()))  # type: ignore[no-untyped-call]
    compare(run, given, arguments(), chunked(7, 5, "eager")).check()
    assert BEFORE_2_13 or len(mstc.reports()) > 1
