"""Dropout inside loops: eager's numbers where eager's are drawn, one mask for forward and backward everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mstc
from testkit.exactness import (
    Gradients,
    chunked,
    gradient_errors,
    gradients_of,
    loops_of,
    lowered_graphs,
    products_outside,
)

WIDTH = 16
aten = torch.ops.aten


class Layered(nn.Module):
    """Two layers with a mixer between them, each with two dropouts, and a head."""

    def __init__(self, inplace: bool = False, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40), nn.GELU(), nn.Dropout(0.2, inplace),
                nn.Linear(40, WIDTH), nn.Dropout(0.1, inplace),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(WIDTH, 7)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for layer in self.layers:
            y = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
            x = x + y
            x = x + x.cumsum(1) / x.shape[1]
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def given(length: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, length, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 7, (2, length), generator=generator)


def seeded(fn: Callable[..., Any], seed: int = 5) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        torch.manual_seed(seed)
        return fn(*args)

    return run


def check_replayed(model: nn.Module, inputs: tuple[Any, ...], lower: str, loops: int, **options: Any) -> None:
    """The same seed gives eager's loss, gradients and random state; everything with a weight runs in loops."""
    leaves = dict(model.named_parameters())
    loss, reference = gradients_of(seeded(model), leaves, inputs)
    state = torch.get_rng_state()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mstc", options=chunked(7, 5, lower, **options), fullgraph=True)
    with lowered_graphs() as graphs:
        got, gradients = gradients_of(seeded(compiled), leaves, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(got, loss, rtol=1e-12, atol=0)
    assert max(gradient_errors(gradients, reference).values()) < 1e-9
    (gm,) = graphs
    assert not products_outside(gm) and len(loops_of(gm)) >= loops


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_numbers_of_eager(lower: str, inplace: bool) -> None:
    check_replayed(Layered(inplace).double(), given(), lower, 3)


def test_checkpointed_blocks_draw_their_masks_again() -> None:
    check_replayed(Layered(checkpointed=True).double(), given(), "aot_eager", 3)


def test_verify_passes_with_dropout() -> None:
    check_replayed(Layered().double(), given(), "eager", 3, verify=True)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first: bool) -> None:
    """`nn.TransformerEncoder` as it comes: dropout in attention, after it (on strided values), twice in the MLP."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(WIDTH, 4, 40, batch_first=True, norm_first=norm_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(WIDTH, 7)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.head(self.encoder(x)).flatten(0, 1), labels.flatten())

    check_replayed(Encoder().double(), given(), "eager", 5)


def test_masks_are_bool_and_enter_the_loops() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Layered().double(), backend="mstc", options=chunked(7, 5, "eager"))
    with lowered_graphs() as graphs:
        compiled(*given())
    masks = graphs[0].graph.find_nodes(op="call_function", target=aten.bernoulli.p)
    assert [m.meta["val"].dtype for m in masks] == [torch.bool] * 4
    assert all(user in loops_of(graphs[0]) for m in masks for user in m.users)
    assert not graphs[0].graph.find_nodes(op="call_function", target=aten.dropout.default)


def test_other_draws_wait_for_nothing() -> None:
    """Noise shaped after a value inside a layer, and a drop of whole samples."""

    class Noisy(Layered):
        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            for layer in self.layers:
                y = layer(x)
                y = y * (torch.rand_like(y) > 0.3) + 0.1 * torch.randn_like(y)
                x = x + y * y.new_empty(y.shape[0], 1, 1).bernoulli_(0.5)
                x = x + x.cumsum(1) / x.shape[1]
            return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())

    check_replayed(Noisy().double(), given(), "eager", 3)


def test_dropout_of_everything_and_of_nothing() -> None:
    model = Layered().double()
    for layer, p in zip(model.layers, (0.0, 1.0), strict=True):
        layer[3].p = p  # type: ignore[index, union-attr]
    check_replayed(model, given(), "eager", 3)


def test_a_region_that_stays_whole_keeps_its_dropout() -> None:
    torch._dynamo.reset()
    mstc.clear_reports()
    compiled = torch.compile(Layered().double(), backend="mstc", options={"lower": "eager"})
    with lowered_graphs() as graphs:
        compiled(*given())
    assert len(graphs[0].graph.find_nodes(op="call_function", target=aten.dropout.default)) == 4
    assert not [e for r in mstc.reports() for e in r.edits if e.pass_name == "draws"]


# -- Inductor: masks from seeds ------------------------------------------------------------------


def slope(fn: Callable[..., Tensor], leaves: dict[str, Tensor], direction: dict[str, Tensor], step: float) -> float:
    """Central difference of the loss along ``direction``."""
    values = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for n, p in leaves.items():
                p.add_(direction[n], alpha=sign * step)
        values.append(float(fn(*given())))
        with torch.no_grad():
            for n, p in leaves.items():
                p.add_(direction[n], alpha=-sign * step)
    return (values[0] - values[1]) / (2 * step)


def dot(a: Gradients, b: dict[str, Tensor]) -> float:
    return sum(float((g * b[n]).sum()) for n, g in a.items() if g is not None)


@pytest.mark.inductor
def test_one_mask_for_forward_and_backward_through_inductor() -> None:
    """The gradient is the slope of the loss with the seed held: forward and backward saw the same masks."""
    model = Layered().double()
    leaves = dict(model.named_parameters())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mstc", options=chunked(7, 5, "inductor"), fullgraph=True)
    with lowered_graphs() as graphs:
        loss, gradients = gradients_of(seeded(compiled), leaves, given())
    assert not products_outside(graphs[0])
    assert len(graphs[0].graph.find_nodes(op="call_function", target=aten.randint.low)) == 4
    held = [n.meta["val"] for n in graphs[0].graph.nodes if n.target is aten.bernoulli.p]
    assert not held
    assert torch.equal(gradients_of(seeded(compiled), leaves, given())[0], loss)
    assert not torch.equal(gradients_of(seeded(compiled, 6), leaves, given())[0], loss)
    generator = torch.Generator().manual_seed(2)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in leaves.items()}
    measured = slope(seeded(compiled), leaves, direction, 1e-6)
    assert abs(measured - dot(gradients, direction)) < 1e-5 * abs(measured)


@pytest.mark.parametrize(("budget", "drawn"), [(None, 0), ("1GiB", 4)])
def test_under_a_budget_any_dropout_may_lie_in_a_loop(budget: str | None, drawn: int) -> None:
    """The plan cuts what is left whole without one, so that no dropout may keep it from that."""
    model = Layered().double()
    leaves = dict(model.named_parameters())
    loss, reference = gradients_of(seeded(model), leaves, given())
    torch._dynamo.reset()
    options = {"lower": "aot_eager", **({"memory_budget": budget} if budget else {})}
    compiled = torch.compile(model, backend="mstc", options=options, fullgraph=True)
    got, gradients = gradients_of(seeded(compiled), leaves, given())
    assert len([e for e in mstc.reports()[-1].edits if e.pass_name == "draws"]) == drawn
    torch.testing.assert_close(got, loss, rtol=1e-12, atol=0)
    assert max(gradient_errors(gradients, reference).values()) < 1e-9


@pytest.mark.slow
@pytest.mark.inductor
def test_masks_do_not_depend_on_the_chunks() -> None:
    losses = []
    for tokens in (4, 11):
        torch._dynamo.reset()
        model = Layered().double()
        compiled = torch.compile(model, backend="mstc", options=chunked(tokens, tokens, "inductor"))
        losses.append(gradients_of(seeded(compiled), dict(model.named_parameters()), given())[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
