"""What is said of the masks of written-out attention: what is proven, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mstc

S = 12
LOWEST = torch.finfo(torch.float64).min


def apart() -> Tensor:
    """How far each query stands behind each key."""
    i = torch.arange(S)
    return i[:, None] - i[None, :]


def added(where: Tensor) -> Tensor:
    return torch.zeros(S, S, dtype=torch.float64).masked_fill(where, LOWEST)


def tanh_cap(a: Tensor) -> Tensor:
    return (a / 5).tanh() * 5


LABELS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nothing": (tanh_cap, "no mask"),
    "masked_fill": (lambda a: tanh_cap(a).masked_fill(apart() < 0, LOWEST), "causal"),
    "where": (lambda a: torch.where(apart() >= 0, tanh_cap(a), LOWEST), "causal"),
    "where the other way": (lambda a: torch.where(apart() < 0, LOWEST, tanh_cap(a)), "causal"),
    "added": (lambda a: tanh_cap(a) + added(apart() < 0), "causal"),
    "a window": (lambda a: tanh_cap(a).masked_fill((apart() < 0) | (apart() >= 4), LOWEST), "causal, window 4"),
    "a window, added after": (
        lambda a: tanh_cap(a).masked_fill(apart() < 0, LOWEST) + added((apart() >= 4) | (apart() < 0)),
        "causal, causal, window 4",
    ),
    "nothing hidden": (lambda a: tanh_cap(a).masked_fill(apart() > S, LOWEST), "no mask"),
    "distances": (
        lambda a: tanh_cap(a).masked_fill(apart() < 0, LOWEST) + 0.5 * apart().double(),
        "explicit mask",
    ),
    "scores made small": (lambda a: tanh_cap(a).masked_fill(apart() < 0, -5.0), "explicit mask"),
    "something between": (lambda a: tanh_cap(a).masked_fill(apart() % 3 == 1, LOWEST), "explicit mask"),
    "decay": (lambda a: a * (0.9 ** apart().abs().double()), "explicit mask"),
}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def label_of(change: Callable[..., Tensor], *more: Tensor, chunk: int | str = "auto") -> str:
    """What the report says of attention with scores that are changed so."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        return F.softmax(change(q @ (k + q).mT, *more), -1) @ v

    torch._dynamo.reset()
    inputs = (randn(2, 3, S, 4), randn(2, 3, S, 4), randn(2, 3, S, 4), *more)
    report = mstc.explain(attend, *inputs, options={"lower": "eager", "query_chunks": {"chunk_tokens": chunk}})
    (found,) = report.regions
    assert bool(found.loop) == (chunk != "auto")
    return found.label


@pytest.mark.parametrize("form", LABELS)
def test_what_is_proven(form: str) -> None:
    change, label = LABELS[form]
    assert label_of(change) == f"attention ({label})"


def padded(a: Tensor, real: Tensor) -> Tensor:
    return tanh_cap(a).masked_fill(~real[:, None, None], LOWEST)


def paired(a: Tensor, real: Tensor) -> Tensor:
    return tanh_cap(a).masked_fill(~real[:, None], LOWEST)


def biased(a: Tensor, table: Tensor) -> Tensor:
    near = F.embedding(apart().clamp(0, 3), table).permute(2, 0, 1)
    return (a + near).masked_fill(apart() < 0, LOWEST)


def scaled(a: Tensor, per_head: Tensor) -> Tensor:
    return (a * per_head).masked_fill(apart() < 0, LOWEST)


@pytest.mark.parametrize("chunk", ["auto", 5])
def test_what_a_call_brings(chunk: int | str) -> None:
    """Padding is told from masks of pairs; what is learned, and what all keys have in common, hides nothing."""
    assert label_of(padded, torch.ones(2, S).bool(), chunk=chunk).endswith("(padding)")
    assert label_of(paired, torch.ones(2, S, S).bool(), chunk=chunk).endswith("(explicit mask)")
    assert label_of(biased, randn(4, 3), chunk=chunk).endswith("(causal)")
    assert label_of(scaled, torch.rand(3, 1, 1, dtype=torch.float64), chunk=chunk).endswith("(causal)")


@pytest.mark.parametrize("scaled_by_length", [False, True])
def test_masks_of_any_length(scaled_by_length: bool) -> None:
    def attend(q: Tensor, k: Tensor, real: Tensor) -> Tensor:
        scores = padded(q @ (k + q).mT, real)
        return F.softmax(scores * (k.shape[2] if scaled_by_length else 1), -1) @ k

    torch._dynamo.reset()
    q, k, real = randn(2, 3, S, 4), randn(2, 3, S, 4), torch.ones(2, S).bool()
    for x, dim in ((q, 2), (k, 2), (real, 1)):
        torch._dynamo.mark_dynamic(x, dim)
    options = {"lower": "eager", "query_chunks": {"chunk_tokens": 5}}
    (found,) = mstc.explain(attend, q, k, real, options=options).regions
    assert found.label.endswith("(padding)")


@pytest.mark.parametrize("lower", ["eager", "inductor"])
@pytest.mark.parametrize("chunk", ["auto", 5])
def test_dropout_hides_nothing(chunk: int | str, lower: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.dropout(F.softmax(tanh_cap(q @ (k + q).mT).masked_fill(apart() < 0, LOWEST), -1), 0.1) @ v

    torch._dynamo.reset()
    inputs = [randn(2, 3, S, 4) for _ in range(3)]
    report = mstc.explain(attend, *inputs, options={"lower": lower, "query_chunks": {"chunk_tokens": chunk}})
    (found,) = report.regions
    assert found.label == f"attention{'' if chunk == 'auto' else ' by queries'} (causal)"
