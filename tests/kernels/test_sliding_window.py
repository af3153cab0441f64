"""Sliding-window attention with sinks against one masked softmax, and merging by log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mstc.kernels import KernelArgumentError, sliding_window_attention
from mstc.kernels.sliding_window.merge import merge
from mstc.kernels.sliding_window.op import sliding_window
from mstc.kernels.sliding_window.reference import reference, visible

Compare = Callable[..., None]


def make(length: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Tensor]:
    shapes = {"q": 20, "k": 20, "v": 33}
    return {n: torch.randn(batch, length, 3, width).to(dtype) for n, width in shapes.items()}


def op(window: int, sinks: int) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda **i: sliding_window_attention(**i, window=window, sinks=sinks, return_lse=True)


def exact(window: int, sinks: int) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda q, k, v: reference(q, k, v, window, sinks, q.shape[-1] ** -0.5)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (7, 0), (64, 4), (100, 30), (2000, 0)])
@pytest.mark.parametrize("length", [1, 15, 63, 64, 65, 300])
def test_matches_one_softmax(length: int, window: int, sinks: int, compare: Compare) -> None:
    compare(op(window, sinks), exact(window, sinks), make(length))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, compare: Compare) -> None:
    compare(op(64, 4), exact(64, 4), make(150, dtype))


def test_gradcheck() -> None:
    inputs = [t[..., :3].double().requires_grad_() for t in make(9, batch=1).values()]
    for form in (op(4, 2), exact(4, 2)):
        assert torch.autograd.gradcheck(lambda q, k, v, f=form: f(q=q, k=k, v=v), inputs, fast_mode=True)


def test_packed_documents(compare: Compare) -> None:
    lengths = [5, 0, 64, 200, 1]
    offsets = torch.tensor([0, *lengths]).cumsum(0)

    def one_by_one(**tokens: Tensor) -> tuple[Tensor, ...]:
        parts = [
            exact(50, 3)(**{n: t[:, a:b] for n, t in tokens.items()}) for a, b in pairwise(offsets.tolist()) if a < b
        ]
        return tuple(torch.cat(side, 1) for side in zip(*parts, strict=True))

    form = lambda **i: sliding_window_attention(  # noqa: E731
        **i, window=50, sinks=3, return_lse=True, cu_seqlens=offsets
    )
    compare(form, one_by_one, make(sum(lengths), batch=1))


def test_merging_two_halves_of_the_keys(compare: Compare) -> None:
    """A window, and everything before it, joined: full causal attention, with its gradients."""

    def earlier(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        positions = torch.arange(q.shape[1])
        hidden = ~visible(positions, positions, 10**9, 0) | visible(positions, positions, 8, 0)
        scores = torch.einsum("bihk,bjhk->bhij", q, k) * q.shape[-1] ** -0.5
        weights = scores.masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0.0)
        seen = scores.masked_fill(hidden, -1e30).logsumexp(-1)
        lse = torch.where(hidden.all(-1), -torch.inf, seen)
        return torch.einsum("bhij,bjhv->bihv", weights, v), lse.transpose(1, 2)

    def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return merge(*op(8, 0)(q=q, k=k, v=v), *earlier(q, k, v))

    compare(merged, exact(10**9, 0), make(40))


def test_two_parts_without_keys() -> None:
    nothing = torch.full((2,), -torch.inf)
    out, lse = merge(torch.zeros(2, 3), nothing, torch.zeros(2, 3), nothing)
    assert torch.equal(out, torch.zeros(2, 3))
    assert torch.equal(lse, nothing)


def test_opcheck() -> None:
    q, k, v = (t.requires_grad_() for t in make(40).values())
    torch.library.opcheck(sliding_window, (q, k, v, None, 8, 2, 0.5))


def test_compiles_whole(compare: Compare) -> None:
    compare(torch.compile(op(8, 2), backend="aot_eager", fullgraph=True), exact(8, 2), make(40))


def test_flops_are_those_of_the_keys_that_are_seen() -> None:
    q, k, v = (t.requires_grad_() for t in make(40).values())
    with FlopCounterMode(display=False) as counter:
        sliding_window_attention(q, k, v, window=8, sinks=3).sum().backward()
    positions = torch.arange(40)
    seen = int(visible(positions, positions, 8, 3).sum())
    assert counter.get_total_flops() == 2 * 2 * 3 * seen * (20 + 33 + 3 * 20 + 2 * 33)


@pytest.mark.parametrize(("name", "number"), [("window", 0), ("sinks", -1)])
def test_bad_numbers(name: str, number: int) -> None:
    settings = {"window": 4, "sinks": 0, name: number}
    with pytest.raises(KernelArgumentError, match=f"{name}: got {number}; allowed: .* or more"):
        sliding_window_attention(**make(8), **settings)
