"""Attention as people write it out becomes the fused op exactly where that says the same."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.nn import functional as F

import mstc
from mstc.graph.attention import WINDOW_ATTENTION, attention_in
from testkit.exactness import Comparison, chunked, compare
from testkit.homegrown import NanoGPT

B, H, S, D = 2, 3, 37, 6
LOWEST = torch.finfo(torch.float64).min
Scores = Callable[[Tensor], Tensor]


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def distance(queries: int = S) -> Tensor:
    return torch.arange(S)[None, :] - torch.arange(queries)[:, None]


def added(where: Tensor, value: float = LOWEST) -> Tensor:
    return torch.zeros(S, S, dtype=torch.float64).masked_fill(where, value)


# What is done to the scores between the two products, and whether the fused call is causal.
FUSED: dict[str, tuple[Scores, bool]] = {
    "nothing": (lambda a: a, False),
    "scale": (lambda a: a / math.sqrt(D), False),
    "factors": (lambda a: a * 3.0 / 7.0, False),
    "masked_fill of a triangle": (
        lambda a: (a * 0.3).masked_fill(torch.tril(torch.ones(S, S)).view(1, 1, S, S) == 0, float("-inf")),
        True,
    ),
    "masked_fill of positions": (lambda a: a.masked_fill(distance() > 0, LOWEST), True),
    "masked_fill of a negation": (lambda a: a.masked_fill(~(distance() <= 0), float("-inf")), True),
    "where": (lambda a: torch.where(distance() <= 0, a * 0.5, LOWEST), True),
    "where with a tensor of one number": (
        lambda a: torch.where(distance() <= 0, a, torch.full([], LOWEST, dtype=a.dtype)),
        True,
    ),
    "added": (lambda a: a * 0.5 + added(distance() > 0), True),
    "added from the left": (lambda a: added(distance() > 0, float("-inf")) + a, True),
    "added triangle": (
        lambda a: a + torch.triu(torch.full((S, S), float("-inf"), dtype=torch.float64), diagonal=1),
        True,
    ),
    "two masks": (lambda a: a.masked_fill(distance() > 0, LOWEST) + added(distance() > 0), True),
    "all true": (lambda a: a.masked_fill(torch.zeros(S, S, dtype=torch.bool), LOWEST), False),
}
# What must stay as it is written.
OTHER: dict[str, Scores] = {
    "softcap": lambda a: torch.tanh(a / 5) * 5,
    "strictly before": lambda a: a.masked_fill((distance() >= 0) & (distance() < S), LOWEST),
    "anti-causal": lambda a: a.masked_fill(distance() < 0, LOWEST),
    "a weak mask": lambda a: a.masked_fill(distance() > 0, -100.0),
    "alibi": lambda a: a + 0.1 * distance(),
    "scale after the mask": lambda a: a.masked_fill(distance() > 0, -70000.0) * 1e-4,
    "negative scale": lambda a: a * -1.0,
    "a learned scale": lambda a: a * a.detach().std(),
    "the inverted mask": lambda a: a.masked_fill(distance() <= 0, LOWEST),
}


def attend(q: Tensor, k: Tensor, v: Tensor, between: Scores) -> Tensor:
    y = F.softmax(between(q @ k.transpose(-2, -1)), dim=-1) @ v
    return (y.transpose(1, 2).reshape(B, S, -1).sin() * 3).square().mean()


def run(between: Scores) -> Comparison:
    q, k, v = (randn(B, H, S, D, seed=i) for i in range(3))
    return compare(lambda q, k, v: attend(q, k, v, between), {"q": q, "k": k, "v": v}, [q, k, v], chunked())


def fused(result: Comparison) -> list[fx.Node]:
    return [n for gm in result.graphs for n in attention_in(gm.graph)]


@pytest.mark.parametrize("name", FUSED)
def test_what_says_the_same_is_fused(name: str) -> None:
    between, causal = FUSED[name]
    result = run(between)
    print(result.describe())
    result.check()
    (call,) = fused(result)
    assert call.args[3:] == (None, 0.0, causal)
    shapes = [n.meta["val"].shape for n in result.graphs[0].graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert not [s for s in shapes if list(s).count(S) > 1]


def far(a: Tensor) -> Tensor:
    return a.masked_fill((distance() > 7) | (distance() < -7), LOWEST)


WINDOWS: dict[str, tuple[Scores, tuple[int, bool]]] = {
    "one mask": (lambda a: a.masked_fill((distance() > 0) | (distance() < -7), float("-inf")), (8, True)),
    "two masks": (lambda a: far(a.masked_fill(distance() > 0, LOWEST)), (8, True)),
    "on both sides": (far, (8, False)),
    "the narrower of two": (lambda a: far(a) + added(distance().abs() > 4), (5, False)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_are_fused(name: str) -> None:
    between, window = WINDOWS[name]
    result = run(between)
    result.check()
    (call,) = fused(result)
    assert call.target is WINDOW_ATTENTION
    assert call.args[3:] == window
    shapes = [n.meta["val"].shape for n in result.graphs[0].graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert not [s for s in shapes if list(s).count(S) > 1]


@pytest.mark.parametrize("name", OTHER)
def test_what_does_not_is_left(name: str) -> None:
    result = run(OTHER[name])
    print(result.describe())
    result.check()
    assert not fused(result)


def test_three_dimensions() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = torch.bmm(q, k.transpose(1, 2)).masked_fill(distance() > 0, float("-inf"))
        return torch.bmm(F.softmax(a, -1), v).sin().mean()

    leaves = {n: randn(B, S, D, seed=i) for i, n in enumerate("qkv")}
    result = compare(loss, leaves, list(leaves.values()), chunked())
    result.check()
    assert len(fused(result)) == 1


def test_values_of_another_width_are_left() -> None:
    leaves = {"q": randn(B, H, S, D), "k": randn(B, H, S, D, seed=1), "v": randn(B, H, S, D + 2, seed=2)}
    result = compare(lambda q, k, v: attend(q, k, v, lambda a: a), leaves, list(leaves.values()), chunked())
    result.check()
    assert not fused(result)


@pytest.mark.parametrize("masked", [True, False])
def test_more_keys_than_queries(masked: bool) -> None:
    """Causal by the first query and key is what the fused op means, but only for as many of both is it proven."""
    leaves = {"q": randn(B, H, 20, D), "k": randn(B, H, S, D, seed=1), "v": randn(B, H, S, D, seed=2)}

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = q @ k.mT
        a = a.masked_fill(distance(20) > 0, float("-inf")) if masked else a
        return (F.softmax(a, -1) @ v).sin().mean()

    result = compare(loss, leaves, list(leaves.values()), chunked())
    result.check()
    assert len(fused(result)) == (not masked)


def test_a_softmax_in_less_precision_is_left() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (F.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype) @ v).sin().mean()

    leaves = {n: randn(B, H, S, D, seed=i) for i, n in enumerate("qkv")}
    result = compare(loss, leaves, list(leaves.values()), chunked())
    result.check()
    assert not fused(result)


def test_a_softmax_in_more_precision_is_fused() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (F.softmax(q @ k.mT, -1, dtype=torch.float64).to(q.dtype) @ v).sin().mean()

    leaves = {n: randn(B, H, S, D, seed=i).detach().float().requires_grad_() for i, n in enumerate("qkv")}
    result = compare(loss, leaves, list(leaves.values()), chunked())
    result.check(torch.float32)
    assert len(fused(result)) == 1


def test_a_buffer_that_changes_brings_the_written_form_back() -> None:
    torch._dynamo.reset()
    mstc.clear_reports()
    torch.manual_seed(0)
    model = NanoGPT(fused=False).double()
    ids = torch.randint(0, 96, (2, 50))
    compiled = torch.compile(model, backend="mstc", options={"lower": "eager"})
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-12, atol=0)
    assert sum("becomes scaled_dot_product_attention" in e.what for e in mstc.reports()[-1].edits) == 2
    for module in model.modules():
        if isinstance(getattr(module, "bias", None), Tensor) and not isinstance(module, nn.Linear | nn.LayerNorm):
            module.bias.fill_(1)
    torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-12, atol=0)


def test_verify() -> None:
    q, k, v = (randn(B, H, S, D, seed=i) for i in range(3))
    between = FUSED["where"][0]
    result = compare(
        lambda q, k, v: attend(q, k, v, between), {"q": q, "k": k, "v": v}, [q, k, v], chunked(verify=True)
    )
    result.check()
    assert len(fused(result)) == 1
