"""Masks from one seed per token: the right rate, independent bits, the same however the tokens are cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mstc.ops.keep import SEEDS

keep = torch.ops.mstc.keep.default


def seeds(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SEEDS, (n,), generator=torch.Generator().manual_seed(seed))


def mask(n: int = 512, width: int = 512, p: float = 0.9, seed: int = 0) -> Tensor:
    return keep(seeds(n, seed), [1, n, width], 1, 1, 1, p)[0].double()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
def test_the_rate(p: float) -> None:
    found = mask(p=p)
    spread = (p * (1 - p)) ** 0.5
    assert abs(found.mean() - p) < 5 * spread / found.numel() ** 0.5
    for dim in (0, 1):
        assert float((found.mean(dim) - p).abs().max()) < 6 * spread / found.shape[dim] ** 0.5


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_bits_are_independent(p: float) -> None:
    """Correlations between neighbours along tokens and features."""
    found = (mask(p=p) - p) / (p * (1 - p)) ** 0.5
    bound = 5 / found.numel() ** 0.5
    for step in (1, 2, 3, 8, 64):
        assert abs((found[step:] * found[:-step]).mean()) < bound
        assert abs((found[:, step:] * found[:, :-step]).mean()) < bound


def test_never_and_always() -> None:
    assert not keep(seeds(4), [4, 8], 0, 1, 1, 0.0).any()
    assert keep(seeds(4), [4, 8], 0, 1, 1, 1.0).all()


def test_batches_differ() -> None:
    found = keep(seeds(64), [2, 64, 64], 1, 1, 1, 0.5)
    assert not torch.equal(found[0], found[1])
    flat = keep(seeds(64), [128, 64], 0, 2, 1, 0.5)
    assert torch.equal(flat.view(2, 64, 64), found)


@pytest.mark.inductor
def test_inductor_computes_the_same_bits() -> None:
    fn = lambda s: keep(s, [2, s.shape[0], 33], 1, 1, 1, 0.9)  # noqa: E731
    given = seeds(50)
    assert torch.equal(torch.compile(fn)(given), fn(given))
