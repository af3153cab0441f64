"""How many chunks: as asked, or where it pays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mstc.graph.regions import Region
from mstc.ops.pieces import balanced
from mstc.plan.chunks import FEWEST_OF_SEVERAL, choose, cut_further, may_hold_several, tokens_of
from testkit.capture import meta, randn, regions_of


def region(length: int, width: int = 64, inner: int = 256, batch: int = 1) -> Region:
    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y = F.linear(F.silu(F.linear(x, up)), down)
        return F.scaled_dot_product_attention(y, y, y)

    (found,) = regions_of(fn, meta(batch, length, width), meta(inner, width), meta(width, inner))[2]
    return found


@pytest.mark.parametrize(
    ("length", "batch", "asked", "count"),
    [(100, 1, 10, 10), (100, 1, 30, 4), (100, 2, 30, 7), (100, 1, 100, 1), (100, 1, 1000, 1), (5, 8, 1, 5)],
)
def test_as_many_tokens_per_chunk_as_asked(length: int, batch: int, asked: int, count: int) -> None:
    assert choose(region(length, batch=batch), asked).count == count


def test_no_chunk_is_larger_than_asked() -> None:
    for length in (2, 5, 12, 37):
        found = region(length)
        for asked in range(1, length + 1):
            chunks = balanced(length, choose(found, asked).count)
            assert max(size for _, size in chunks) <= asked
            assert sum(size for _, size in chunks) == length


def test_auto_declines_where_chunks_do_not_pay() -> None:
    short, thin = choose(region(512, 512, 2048), "auto"), choose(region(4096, 8, 8), "auto")
    assert short.count == thin.count == 1
    assert short.reason == "512 tokens with 9.0 MiB of intermediates: chunks would not pay"
    assert thin.reason == "4096 tokens with 384.0 KiB of intermediates: chunks would not pay"


def test_auto_chunks_long_sequences_evenly() -> None:
    found = choose(region(8192, 512, 1792), "auto")
    assert found.count > 1 and 8192 % found.count == 0
    assert "tokens per chunk" in found.reason


@pytest.mark.parametrize(("n", "count"), [(10, 3), (9, 3), (1, 1), (7, 7), (100, 9)])
def test_balanced_chunks(n: int, count: int) -> None:
    chunks = balanced(n, count)
    sizes = [size for _, size in chunks]
    assert len(chunks) == count and sum(sizes) == n and max(sizes) - min(sizes) <= 1
    assert [start for start, _ in chunks] == [sum(sizes[:i]) for i in range(count)]


def test_a_loss_pays_sooner_than_what_runs_again() -> None:
    def head(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (F.linear(x, weight) * bias).logsumexp(-1).sum()

    width, classes = 64, 32000
    for tokens in (2047, 2048):  # the first where labels are shifted before the head
        (loss,) = regions_of(head, meta(1, tokens, width), meta(classes, width), meta(classes))[2]
        assert loss.sums and choose(loss, "auto").count > 1
    assert choose(region(2048, 4096, 16384), "auto").count == 1
    assert choose(region(4096, 4096, 16384), "auto").count > 1
    assert choose(region(2048, 4096, 16384, batch=2), "auto").count > 1


def distillation(x: Tensor, weight: Tensor, teacher: Tensor) -> Tensor:
    return (F.linear(x, weight) * F.linear(x, teacher)).logsumexp(-1).sum()


def test_a_loss_of_several_scores_is_cut_further() -> None:
    width, classes = 64, 128000
    (loss,) = regions_of(distillation, meta(1, 8192, width), meta(classes, width), meta(classes, width))[2]
    chosen = choose(loss, "auto")
    assert may_hold_several(loss) and chosen.count == 16
    assert cut_further(chosen, loss, 1.1) == chosen
    assert [cut_further(chosen, loss, several).count for several in (2.0, 2.1, 3.0, 4.1)] == [32, 32, 64, 64]
    assert cut_further(chosen, loss, 100.0).count == 8192 // FEWEST_OF_SEVERAL


def test_one_product_of_all_classes_holds_no_several() -> None:
    def head(x: Tensor, weight: Tensor, value: Tensor) -> Tensor:
        h = F.silu(x)
        return F.linear(h, weight).logsumexp(-1).sum() + F.linear(h, value).sum()

    (loss,) = regions_of(head, meta(1, 8192, 64), meta(32000, 64), meta(1, 64))[2]
    assert not may_hold_several(loss)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w,
        lambda x, w: torch.einsum("btd,dhk->bthk", x, w.view(8, 4, 6)),
        lambda x, w: torch.einsum("dn,btd->nbt", w, x),
        lambda x, w: F.conv1d(x.transpose(1, 2), w.T[:, :, None]),
        lambda x, w: torch.bmm(x, w.expand(2, 8, 24)),
    ],
    ids=["matmul", "einsum", "weight first", "convolution", "repeated weight"],
)
def test_tokens_are_the_rows_of_products(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    regions = regions_of(lambda x, w: product(torch.tanh(x) + x.cumsum(1), w).square(), randn(2, 23, 8), randn(8, 24))[
        2
    ]
    assert [tokens_of(r) for r in regions] == [2 * 23]


def test_weights_that_each_token_has_of_its_own_are_no_tokens() -> None:
    """Experts of the tokens, gathered: as many rows as tokens choose, none for the features of the weights."""

    def experts(x: Tensor, down: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        return F.linear(torch.bmm((x + x.cumsum(0))[:, None], weight[chosen]).squeeze(1), down)

    (found,) = regions_of(experts, randn(23, 8), randn(2, 6), randn(4, 8, 6), torch.randint(4, (23,)))[2]
    assert tokens_of(found) == 23


def test_heads_of_a_small_product_are_no_tokens() -> None:
    """Queries mixed per head have more rows than tokens; the MLP costs more, and its rows count."""

    def fn(x: Tensor, up: Tensor, down: Tensor, mix: Tensor) -> Tensor:
        y = x + F.linear(F.silu(F.linear(x, up)), down)
        q = torch.matmul(y.unflatten(-1, (4, 2)), mix).flatten(-2)
        return F.scaled_dot_product_attention(q, q, q)

    (found,) = regions_of(fn, randn(2, 23, 8), randn(32, 8), randn(8, 32), randn(2, 2))[2]
    assert tokens_of(found) == 2 * 23
