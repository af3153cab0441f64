"""Where regions are cut: the head before its last products, q/k/v into a loop that runs again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mstc.graph.costs import is_heavy
from mstc.plan.split import split_head, split_recompute
from testkit.capture import node, randn, regions_of

aten = torch.ops.aten
UP, DOWN, HEAD, QKV = randn(12, 4), randn(4, 12), randn(9, 4), randn(12, 4)


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + F.linear(F.silu(F.linear(x, up)), down)


def test_the_head_starts_after_the_products_before_it_and_holds_its_norm() -> None:
    def fn(x: Tensor, up: Tensor, down: Tensor, head: Tensor) -> Tensor:
        return F.linear(F.layer_norm(mlp(x, up, down), (4,)), head).logsumexp(-1).sum()

    graph, axes, (region,) = regions_of(fn, randn(2, 7, 4), UP, DOWN, HEAD)
    before, head = split_head(axes, region)
    assert before is not None
    assert [n.target for n in before.heavy] == [aten.linear.default] * 2
    assert node(graph, aten.layer_norm.default) in head.nodes and node(graph, aten.linear.default, 2) in head.nodes
    assert head.sums == region.sums and not before.sums


def test_a_head_whose_results_are_the_narrowest_values_keeps_its_product() -> None:
    narrow = randn(2, 12)
    graph, axes, (region,) = regions_of(
        lambda x, up, w: F.linear(F.silu(F.linear(x, up)), w).square().sum(), randn(2, 7, 4), UP, narrow
    )
    _, head = split_head(axes, region)
    assert node(graph, aten.linear.default, 1) in head.nodes


def test_a_region_with_one_product_stays_whole() -> None:
    _, axes, (region,) = regions_of(lambda x, w: F.linear(x.sin(), w).square().sum(), randn(2, 7, 4), HEAD)
    before, head = split_head(axes, region)
    assert before is None and head is region


def layer(x: Tensor, up: Tensor, down: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream, and what only a mixer reads."""
    x = mlp(x, up, down)
    return x.cumsum(1), F.linear(F.layer_norm(x, (4,)), qkv).cumsum(1)


def test_what_only_mixers_read_runs_again() -> None:
    graph, axes, (region,) = regions_of(layer, randn(2, 7, 4), UP, DOWN, QKV)
    residual = node(graph, aten.add.Tensor)
    once, again = split_recompute(axes, region, lambda n: n is residual)
    assert not once.recompute and again.recompute
    assert [n.target for n in once.region.heavy] == [aten.linear.default] * 2
    assert set(again.region.nodes) == {node(graph, aten.layer_norm.default), node(graph, aten.linear.default, 2)}
    assert [n for n, _ in again.region.tokens] == [residual], "it starts from a value that is kept anyway"


def test_the_parts_hold_every_product_once() -> None:
    _, axes, (region,) = regions_of(layer, randn(2, 7, 4), UP, DOWN, QKV)
    parts = split_recompute(axes, region, lambda n: n.target is aten.add.Tensor)
    products = [n for part in parts for n in part.region.nodes if is_heavy(n)]
    assert sorted(n.name for n in products) == sorted(n.name for n in region.heavy)


def test_nothing_to_recompute_where_everything_is_kept() -> None:
    _, axes, (region,) = regions_of(layer, randn(2, 7, 4), UP, DOWN, QKV)
    (part,) = split_recompute(axes, region, lambda n: True)
    assert part.region is region and not part.recompute
