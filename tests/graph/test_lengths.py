"""Sizes are computed from the lengths of the inputs, so that nothing waits for a value to learn its size."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from torch import Tensor
from torch.nn import functional as F

from testkit.capture import dynamic_graph


def sizes_of(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if isinstance(n.meta.get("val"), (torch.SymInt, torch.SymFloat))]


def shifted(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)[:, :-1]
    return y.reshape(y.shape[0] * y.shape[1], -1).sum(1)


def halved(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    return y[:, : y.shape[1] // 2] * 2


def grown(x: Tensor, w: Tensor) -> Tensor:
    y = torch.cat([F.linear(x, w), x], 1)
    return y.flatten(0, 1) + torch.arange(y.shape[0] * y.shape[1]).view(-1, 1)


def padded(x: Tensor, w: Tensor) -> Tensor:
    """To whole patches of four tokens."""
    y = F.linear(F.pad(x, (0, 0, 0, -x.shape[1] % 4)), w)
    return y.unflatten(1, (-1, 4)).flatten(2).sum(1)


def trimmed(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)
    return y[:, : y.shape[1] - y.shape[1] % 5].unflatten(1, (-1, 5)).flatten(2).sum(1)


def first(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)[:, : min(x.shape[1], 5)]
    return y.reshape(y.shape[0] * y.shape[1], -1).sum(1)


def at_least(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(F.pad(x, (0, 0, 0, max(16 - x.shape[1], 0))), w)
    return y.reshape(y.shape[0] * y.shape[1], -1).sum(1)


def three_quarters(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(x, w)[:, : int(0.75 * x.shape[1])]
    return y.reshape(y.shape[0] * y.shape[1], -1).sum(1)


def in_fives(x: Tensor, w: Tensor) -> Tensor:
    y = F.linear(F.pad(x, (0, 0, 0, 5 * math.ceil(x.shape[1] / 5) - x.shape[1])), w)
    return y.reshape(y.shape[0] * y.shape[1], -1).sum(1)


@pytest.mark.parametrize("fn", [shifted, halved, grown, padded, trimmed, first, at_least, three_quarters, in_fives])
def test_sizes_depend_on_inputs_only(fn: Callable[..., Tensor]) -> None:
    gm = dynamic_graph(fn, torch.randn(2, 12, 8), torch.randn(8, 8))
    sizes = sizes_of(gm)
    assert any(n.op == "call_function" for n in sizes)
    for node in sizes:
        if node.op != "placeholder":
            assert all(i in sizes or i.op == "placeholder" for i in node.all_input_nodes), node.format_node()
