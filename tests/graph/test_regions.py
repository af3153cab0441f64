"""Regions: maximal convex tokenwise stretches, with what enters and leaves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mstc.graph.axes import NotTokenwise
from mstc.graph.regions import FEW_KEYS, left_outside
from testkit.capture import labels_of, node, randn, regions_of

aten = torch.ops.aten
UP, DOWN = randn(12, 4), randn(4, 12)


def mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x + F.linear(F.silu(F.linear(x, up)), down)


def attended(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Region, mixer, region."""
    y = mlp(x, up, down)
    y = y + F.scaled_dot_product_attention(y, y, y, is_causal=True)
    return mlp(y, up, down)


def test_a_mixer_parts_two_regions() -> None:
    graph, _, regions = regions_of(attended, randn(2, 7, 4), UP, DOWN)
    attention = node(graph, aten.scaled_dot_product_attention.default)
    order = {n: i for i, n in enumerate(graph.nodes)}
    assert len(regions) == 2
    assert all(order[n] < order[attention] for n in regions[0].nodes)
    assert all(order[n] > order[attention] for n in regions[1].nodes)
    assert [len(r.heavy) for r in regions] == [2, 2]


@pytest.mark.parametrize(("states", "inside"), [(FEW_KEYS, True), (FEW_KEYS + 1, False)])
def test_attention_over_few_keys_of_each_token_is_inside(states: int, inside: bool) -> None:
    """Over the outputs of earlier layers, say: computed again, it costs little."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y = mlp(x, up, down)
        stacked = torch.stack([y * i for i in range(states)], -2)
        query = y.mean((0, 1)).expand(2, 70, 1, -1)
        return mlp(F.scaled_dot_product_attention(query, stacked, stacked).squeeze(-2), up, down)

    graph, _, regions = regions_of(fn, randn(2, 70, 4), UP, DOWN)
    attention = node(graph, aten.scaled_dot_product_attention.default)
    assert any(attention in r.nodes for r in regions) == inside


def test_keys_that_are_the_queries_keep_attention_outside() -> None:
    graph, _, regions = regions_of(attended, randn(2, FEW_KEYS - 1, 4), UP, DOWN)
    attention = node(graph, aten.scaled_dot_product_attention.default)
    assert regions and not any(attention in r.nodes for r in regions)


def test_inputs_outputs_and_weights() -> None:
    graph, _, regions = regions_of(attended, randn(2, 7, 4), UP, DOWN)
    x, up, down = graph.find_nodes(op="placeholder")
    first, second = regions
    assert [n for n, _ in first.tokens] == [x] and set(first.shared) == {up, down}
    assert len(first.outputs) == 1 and first.outputs[0][0].target is aten.add.Tensor
    attention = node(graph, aten.scaled_dot_product_attention.default)
    assert {n for n, _ in second.tokens} == {attention, first.outputs[0][0]}
    assert [n for n, _ in second.outputs] == list(graph.output_node().args[0])


def test_regions_are_convex() -> None:
    """A path that leaves a region never comes back, whatever bypasses the mixer."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        early = mlp(x, up, down)
        late = mlp(early - early.mean(1, keepdim=True), up, down)
        return early * late + x

    _, _, regions = regions_of(fn, randn(2, 7, 4), UP, DOWN)
    assert len(regions) == 2
    for region in regions:
        inside, reached = set(region.nodes), set()
        stack = [u for n in region.nodes for u in n.users if u not in inside]
        while stack:
            outside = stack.pop()
            if outside in reached:
                continue
            reached.add(outside)
            assert outside not in inside, f"{labels_of(region.nodes)} is left and entered again"
            stack.extend(outside.users)


def test_a_sum_over_tokens_ends_the_region() -> None:
    graph, _, regions = regions_of(lambda x, up, down: mlp(x, up, down).square().sum(), randn(2, 7, 4), UP, DOWN)
    (region,) = regions
    assert region.sums == (node(graph, aten.sum.default),) and not region.outputs


def test_a_gradient_free_stretch_without_products_is_no_region() -> None:
    assert regions_of(lambda x: (x.sin() * 2).cumsum(1), randn(2, 7, 4))[2] == []


def test_the_sequence_is_cut_not_the_batch() -> None:
    _, _, regions = regions_of(attended, randn(9, 7, 4), UP, DOWN)
    assert {r.n for r in regions} == {7}


REMADE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "attention": lambda y, at: y,
    "a slice": lambda y, at: y[:, 2:],
    "a slice of a slice": lambda y, at: y[:, 1:][:, :5],
    "with a token before it": lambda y, at: torch.cat([y[:, :1] * 0, y], 1),
    "padded": lambda y, at: F.pad(y, (0, 0, 0, 3)),
    "picked positions": lambda y, at: y.index_select(1, at),
}


@pytest.mark.parametrize("part", REMADE.values(), ids=REMADE)
def test_what_is_made_of_a_sequence_is_one(part: Callable[[Tensor, Tensor], Tensor]) -> None:
    """So it is cut, and not the batch, though that is longer here."""

    def fn(x: Tensor, up: Tensor, down: Tensor, at: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return F.gelu(F.linear(part(y, at), up)) @ down.t()

    x, at = randn(12, 7, 4), torch.tensor([5, 0, 3])
    _, _, regions = regions_of(fn, x, UP, DOWN, at)
    assert [r.n for r in regions] == [part(x, at).shape[1]]


def test_an_unknown_op_on_labels_makes_no_sequence() -> None:
    """``labels[~mask] = 0`` knows batch and tokens alike; heads of texts without their last token are cut by token."""

    def fn(x: Tensor, labels: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y = attended(x, up, down)[:, :-1]
        ignored = labels[:, 1:] == 3
        labels = labels[:, 1:].index_put((ignored,), torch.zeros((), dtype=torch.int64))
        scores = F.linear(F.linear(y, up), down).gather(-1, labels[..., None])
        return (scores * ~ignored[..., None]).sum()

    labels = torch.arange(21).view(3, 7) % 4
    assert {r.n for r in regions_of(fn, randn(3, 7, 4), labels, UP, DOWN)[2]} == {7, 6}


def test_an_unknown_op_does_not_make_a_batch_a_sequence() -> None:
    """It may mix whatever it reads; attention beside it tells what the sequence is, even where the batch is longer."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return torch.linalg.matrix_exp(attended(x, up, down)[..., :4, :4])

    _, _, regions = regions_of(fn, randn(9, 7, 4), UP, DOWN)
    assert {r.n for r in regions} == {7}


def test_a_batch_is_cut_where_there_is_no_sequence() -> None:
    (region,) = regions_of(mlp, randn(9, 4), UP, DOWN)[2]
    assert region.n == 9


def test_positions_stay_outside() -> None:
    def fn(x: Tensor, positions: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return mlp(x * positions.unsqueeze(-1).cos(), up, down)

    graph, _, (region,) = regions_of(fn, randn(2, 7, 4), torch.arange(7), UP, DOWN)
    assert node(graph, aten.cos.default) not in region.nodes
    assert node(graph, aten.mul.Tensor) in region.nodes


def test_a_sum_over_one_axis_belongs_to_no_region_of_another() -> None:
    """Pooled over its tokens, a text is one row of a batch, which the products behind it treat row by row."""

    def fn(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return mlp(attended(x, up, down).sum(1), up, down)

    _, _, regions = regions_of(fn, randn(9, 7, 4), UP, DOWN)
    assert [r.n for r in regions] == [7, 7, 9]
    claimed = [n for r in regions for n in (*r.nodes, *r.sums)]
    assert len(claimed) == len(set(claimed))


def test_wide_targets_are_made_inside_their_loss() -> None:
    classes, tokens = 64, 9

    def soft(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        target = F.one_hot(labels, classes).to(x.dtype) * 0.9 + 0.1 / classes
        return -(target * F.linear(x, weight).log_softmax(-1)).sum()

    graph, _, (region,) = regions_of(soft, randn(1, tokens, 4), randn(classes, 4), torch.arange(tokens)[None])
    labels = graph.find_nodes(op="placeholder")[2]
    assert node(graph, aten.one_hot.default) in region.nodes
    assert labels in [n for n, _ in region.tokens]


def test_targets_that_others_read_too_and_narrow_ones_are_inputs() -> None:
    classes, tokens = 64, 9

    def shared(x: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        target = F.one_hot(labels, classes)
        return -(target * F.linear(x, weight).log_softmax(-1)).sum(), target

    def narrow(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.linear(x, weight).gather(-1, labels.clamp(min=0).unsqueeze(-1)).sum()

    for loss, target in ((shared, aten.one_hot.default), (narrow, aten.clamp.default)):
        graph, _, (region,) = regions_of(loss, randn(1, tokens, 4), randn(classes, 4), torch.arange(tokens)[None])
        assert node(graph, target) not in region.nodes


def left(fn: Callable[..., Any], *inputs: Tensor) -> list[str]:
    """Reasons why products with a weight lie in no region."""
    return [reason for _, reason in left_outside(*regions_of(fn, *inputs))]


def mixed_tokens(x: Tensor, up: Tensor) -> Tensor:
    """An MLP-Mixer's: a weight for each pair of tokens, and one for each pair of features."""
    y = x + F.linear(x.mT, up).mT
    return y + F.linear(y, up)


def test_what_lies_in_no_region_is_told() -> None:
    """Without a batch nothing can be cut; with one, its texts can."""
    up = randn(5, 5)
    assert left(mixed_tokens, randn(5, 5), up) == ["all its axes are features of some weight"] * 2
    assert not left(mixed_tokens, randn(3, 5, 5), up)


@pytest.mark.parametrize(
    "fn",
    [
        attended,
        lambda x, up, down: F.linear(x.sum((0, 1)), up),
        lambda x, up, down: F.linear(x.sum((0, 1), keepdim=True), up),
        lambda x, up, down: x + torch.arange(7.0, dtype=x.dtype)[:, None] @ down.detach().sum(1)[None],
    ],
    ids=["attention", "a vector", "a row", "positions"],
)
def test_nothing_is_told_of_what_is_fine(fn: Callable[..., Any]) -> None:
    assert not left(fn, randn(2, 7, 4), UP, DOWN)


def triangle(x: Tensor, w: Tensor) -> Tensor:
    """Each side of the pairs meets the other: they are one axis, and each value has it twice."""
    left, right = F.linear(x, w).chunk(2, -1)
    mixed = torch.einsum("bkid,bkjd->bijd", left, right)
    return F.linear(mixed * x.sigmoid(), w).sum()


def relation(x: Tensor, w: Tensor) -> Tensor:
    return F.linear(F.silu(x.unsqueeze(1) + x.unsqueeze(2)), w).sum()


@pytest.mark.parametrize(("fn", "shape", "weight"), [(triangle, (1, 6, 6, 4), (8, 4)), (relation, (1, 6, 4), (3, 4))])
def test_rows_of_pairs_are_cut(fn: Callable[[Tensor, Tensor], Tensor], shape: Any, weight: Any) -> None:
    graph, axes, regions = regions_of(fn, randn(*shape), randn(*weight))
    products = graph.find_nodes(op="call_function", target=aten.linear.default)
    inside = {n for r in regions for n in r.nodes}
    assert inside.issuperset(products)
    assert not any(isinstance(axes.tokenwise(n, r.axis), NotTokenwise) for r in regions for n in r.nodes)


def test_all_results_of_an_op_are_cut_or_none() -> None:
    """One side of the queries meets the other side of the keys; both are pieces of one product."""

    def attention(x: Tensor, w: Tensor) -> Tensor:
        queries, keys = F.linear(x.unsqueeze(1) * x.unsqueeze(2), w).split(4, -1)
        return (queries @ keys.transpose(-1, -2)).softmax(-1).sum()

    graph, _, regions = regions_of(attention, randn(1, 6, 4), randn(8, 4))
    (pieces,) = graph.find_nodes(op="call_function", target=aten.split.Tensor)
    (region,) = (r for r in regions if pieces in r.nodes)
    assert set(pieces.users) <= set(region.nodes)
