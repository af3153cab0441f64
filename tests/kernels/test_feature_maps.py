"""Feature maps, and the normalizer as one more column of the state."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mstc.kernels import KernelArgumentError
from mstc.kernels import feature_maps as maps
from mstc.kernels.sliding_window.merge import merge

MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": maps.identity,
    "elu": maps.elu_plus_one,
    "relu": maps.relu,
    "taylor": maps.taylor,
    "hedgehog": lambda x: maps.hedgehog(x, torch.linspace(-1, 1, 24, dtype=x.dtype).view(2, 4, 3)),
    "rebased": lambda x: maps.rebased(x, torch.linspace(1, 2, 4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)),
}
POSITIVE = [name for name in MAPS if name not in ("identity", "relu")]


@pytest.mark.parametrize("name", list(MAPS))
def test_gradcheck(name: str) -> None:
    x = torch.randn(1, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(MAPS[name], x)


def test_taylor_is_the_start_of_the_exponential() -> None:
    x, y = torch.randn(2, 5, 1, 1, 16, dtype=torch.float64).unbind()
    s = (x * y).sum(-1) / 4
    torch.testing.assert_close((maps.taylor(x) * maps.taylor(y)).sum(-1), 1 + s + s**2 / 2)


def test_taylor_of_too_many_channels() -> None:
    with pytest.raises(KernelArgumentError, match="x: got K=22, 276 features; allowed: K of at most 21"):
        maps.taylor(torch.randn(1, 1, 1, 22))


def test_hedgehog_sums_to_two() -> None:
    features = MAPS["hedgehog"](torch.randn(1, 3, 2, 4))
    torch.testing.assert_close(features.sum(-1), torch.full((1, 3, 2), 2.0))


def weights(q: Tensor, k: Tensor) -> Tensor:
    """The attention matrix phi(q) phi(k)^T, causal, not normalized."""
    return torch.einsum("bihk,bjhk->bhij", q, k).tril()


@pytest.mark.parametrize("name", POSITIVE)
def test_normalized_attention(name: str) -> None:
    q, k = (torch.randn(2, 70, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 70, 2, 5, dtype=torch.float64, requires_grad=True)
    matrix = weights(MAPS[name](q), MAPS[name](k))
    wanted = torch.einsum("bhij,bjhv->bihv", matrix / matrix.sum(-1, keepdim=True), v)
    got, log, state = maps.normalized_attention(MAPS[name](q), MAPS[name](k), v)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(log, matrix.sum(-1).log().transpose(1, 2))
    assert state.shape[-1] == 6
    for a, b in zip(
        torch.autograd.grad(got.sum(), (q, k, v)), torch.autograd.grad(wanted.sum(), (q, k, v)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_the_normalizer_joins_a_softmax() -> None:
    """Two linear parts over disjoint keys, merged by the logs of their normalizers, are one."""
    q, k = (maps.elu_plus_one(torch.randn(1, 30, 2, 4, dtype=torch.float64)) for _ in range(2))
    v = torch.randn(1, 30, 2, 5, dtype=torch.float64)
    whole, log, _ = maps.normalized_attention(q, k, v)
    keep = (torch.arange(30) % 2 == 0).view(1, 30, 1, 1)
    parts = []
    for mask in (keep, ~keep):
        matrix = weights(q, k * mask)
        total = matrix.sum(-1)
        out = torch.einsum("bhij,bjhv->bihv", matrix / total.clamp(min=1e-30).unsqueeze(-1), v)
        parts += [out, total.log().transpose(1, 2)]
    merged, lse = merge(*parts)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(lse, log)


def test_no_column_left() -> None:
    q = torch.randn(1, 2, 1, 4)
    with pytest.raises(KernelArgumentError, match="v: got last dimension 256; allowed: 1 to 255"):
        maps.normalized_attention(q, q, torch.randn(1, 2, 1, 256))
