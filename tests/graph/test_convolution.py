"""Convolutions of single positions are matrix products of tokens; others stay."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mstc.graph.costs import is_heavy, matmul_flops
from testkit.capture import node, normal_graph, randn
from testkit.exactness import chunked, compare, loops_of

aten = torch.ops.aten


def convolutions(*sizes: int, **more: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Conv1d(a, b, 1, **more).double() for a, b in itertools.pairwise(sizes))


def mlp(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """x + down(gelu(up(x))), then a head; classes second."""
    up, down, head = layers
    return head(x + down(F.gelu(up(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "lower", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]
)
def test_a_sequence_of_channels_runs_in_loops(lower: str) -> None:
    layers, x, labels = convolutions(8, 24, 8, 11), randn(2, 23, 8), torch.randint(0, 11, (2, 23))

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        mixed = x + x.cumsum(1) / 23
        return F.cross_entropy(mlp(layers, mixed.transpose(1, 2)), labels)

    result = compare(loss, {**dict(layers.named_parameters()), "x": x}, (x, labels), chunked(7, 5, lower))
    result.check()
    (graph,) = result.graphs
    assert any(str(n.target).startswith("mstc.loss_loop") for n in loops_of(graph)), result.describe()
    assert not graph.graph.find_nodes(op="call_function", target=aten.convolution.default)


def test_pictures_and_groups_run_in_loops() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Conv2d(8, 24, 1, groups=4, bias=False), nn.Conv2d(24, 8, 1, groups=2)]).double()
    x = randn(2, 8, 9, 5)

    def loss(x: Tensor) -> Tensor:
        return layers[1](F.gelu(layers[0](x))).square().sum()  # type: ignore[no-any-return]

    result = compare(loss, {**dict(layers.named_parameters()), "x": x}, (x,), chunked(7, 5))
    result.check()
    assert result.loops and not result.graphs[0].graph.find_nodes(op="call_function", target=aten.convolution.default)


@pytest.mark.parametrize(
    ("convolve", "flops"),
    [
        (lambda x, w: F.conv1d(x, w[:, :, :1]), 2 * 2 * 6 * 9 * 4),
        (lambda x, w: F.conv1d(x, w[:, :2, :1], groups=2), 2 * 2 * 6 * 9 * 2),
        (lambda x, w: F.conv1d(x, w), 0),
        (lambda x, w: F.conv1d(x, w[:, :, :1], stride=2), 0),
        (lambda x, w: F.conv1d(x, w[:, :, :1], padding=1), 0),
        (lambda x, w: F.conv_transpose1d(x, w[:4, :, :1]), 0),
    ],
    ids=["pointwise", "groups", "kernel", "stride", "padding", "transposed"],
)
def test_which_are_products(convolve: Callable[[Tensor, Tensor], Tensor], flops: int) -> None:
    found = node(normal_graph(convolve, randn(2, 4, 9), randn(6, 4, 3)), aten.convolution.default)
    assert matmul_flops(found) == flops and is_heavy(found) == bool(flops)
