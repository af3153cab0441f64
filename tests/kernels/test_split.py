"""Splitting T anywhere and combining gives the whole."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mstc.kernels import split
from mstc.kernels.api import linear_attention

KINDS = ["none", "head", "token", "vector", "delta none", "delta token", "delta vector"]


def make(kind: str, length: int) -> dict[str, Tensor | None]:
    shape = {"none": None, "head": (3,), "token": (2, length, 3), "vector": (2, length, 3, 8)}[
        kind.removeprefix("delta ")
    ]
    k = torch.nn.functional.normalize(torch.randn(2, length, 3, 8), dim=-1)
    return {
        "q": torch.randn(2, length, 3, 8),
        "k": k,
        "v": torch.randn(2, length, 3, 5),
        "decay": None if shape is None else -torch.rand(shape),
        "beta": torch.rand(2, length, 3) if kind.startswith("delta") else None,
    }


def cut(inputs: dict[str, Tensor | None], start: int, stop: int) -> dict[str, Tensor | None]:
    return {n: t if t is None or t.dim() < 3 else t[:, start:stop] for n, t in inputs.items()}


@pytest.mark.parametrize("cuts", [(1,), (64,), (99,), (7, 50, 51), (10, 20, 64, 80)])
@pytest.mark.parametrize("kind", KINDS)
def test_split_anywhere(kind: str, cuts: tuple[int, ...]) -> None:
    length = 100
    inputs = {n: None if t is None else t.requires_grad_() for n, t in make(kind, length).items()}
    initial = torch.randn(2, 3, 8, 5, requires_grad=True)
    whole, final = linear_attention(**inputs, initial_state=initial, output_final_state=True)
    outs, prefixes = [], []
    state: Tensor = initial
    for start, stop in pairwise((0, *cuts, length)):
        part = cut(inputs, start, stop)
        out, prefix = split.local(**part)
        prefixes.append(prefix)
        rest = {n: part[n] for n in ("k", "decay", "beta")}
        outs.append(out + split.correct(part["q"], state=state, **rest))
        state = split.apply(prefix, state)
    joined = split.apply(reduce(split.combine, prefixes), initial)
    for got, wanted in ((torch.cat(outs, 1), whole), (state, final), (joined, final)):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    leaves = [t for t in (*inputs.values(), initial) if t is not None]
    wanted_grads = torch.autograd.grad((whole.sum(), final.square().sum()), leaves)
    got_grads = torch.autograd.grad((torch.cat(outs, 1).sum(), joined.square().sum()), leaves)
    for got, wanted in zip(got_grads, wanted_grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


def test_combine_is_associative() -> None:
    a, b, c = (split.local(**make("token", 9))[1] for _ in range(3))
    left = split.combine(split.combine(a, b), c)
    right = split.combine(a, split.combine(b, c))
    torch.testing.assert_close(left.state, right.state)
    torch.testing.assert_close(left.transition, right.transition)
