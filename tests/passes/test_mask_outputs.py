"""Masks that one graph makes and another reads: the proof goes along with the tensor, and only as long as it holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mstc
from mstc.graph.predicates.constants import Bands, Ramp, describe
from mstc.graph.predicates.marks import mark, marked
from mstc.options import parse_options
from mstc.passes.base import Context
from mstc.passes.mask_outputs import find
from testkit.capture import normal_graph
from testkit.exactness import gradient_errors, gradients_of, lowered_graphs

N = 9


def causal(i: Tensor, j: Tensor) -> Tensor:
    return j <= i


MASKS: dict[str, Any] = {
    "causal": causal,
    "window": lambda i, j: (j <= i) & (i - j < 4),
    "both sides": lambda i, j: (i - j < 3) & (j - i < 3),
    "a window as long as the text": lambda i, j: (j <= i) & (i - j < 100),
    "everything": lambda i, j: i + j >= 0,
}


def built(seen: Any, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1])
    return seen(positions[:, None], positions[None]).expand(x.shape[0], 1, -1, -1).clone()


@pytest.mark.parametrize("name", MASKS)
def test_the_recorded_values_are_the_mask(name: str) -> None:
    x = torch.randn(2, N, 4)
    graph = normal_graph(lambda x: built(MASKS[name], x), x)
    (site,) = find(graph.owning_module, Context(parse_options({}), training=False))
    assert site.values == describe(built(MASKS[name], x)[:1])


def test_masks_of_run_time_values_are_not_recorded() -> None:
    x, ids = torch.randn(2, N, 4), torch.zeros(2, N, dtype=torch.long)
    graph = normal_graph(lambda x, ids: (ids[:, None, :, None] == ids[:, None, None, :], x > 0), x, ids)
    assert not list(find(graph.owning_module, Context(parse_options({}), training=False)))


def test_a_mark_ends_with_a_write() -> None:
    tensor, values = torch.ones(3, 3, dtype=torch.bool), Ramp(True, 0, 0)
    mark(tensor, values)
    assert marked(tensor) == values and marked(tensor.clone()) is None
    tensor[0, 0] = False
    assert marked(tensor) is None


def attend(x: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], attn_mask=mask).square().mean()


def two_graphs(x: Tensor, change: bool = False) -> Tensor:
    mask = built(causal, x)
    torch._dynamo.graph_break()
    if change:
        _change(mask)
    return attend(x * 2, mask)


@torch.compiler.disable
def _change(mask: Tensor) -> None:
    mask[..., -1, 0] = False


def test_a_mask_from_an_earlier_graph_is_recovered() -> None:
    x = torch.randn(2, N, 4, dtype=torch.float64).requires_grad_()
    _, expected = gradients_of(two_graphs, {"x": x}, (x,))
    torch._dynamo.reset()
    mstc.clear_reports()
    fast = torch.compile(two_graphs, backend="mstc", options={"lower": "aot_eager"})
    with lowered_graphs() as graphs:
        for _ in range(3):
            _, got = gradients_of(fast, {"x": x}, (x,))
            assert max(gradient_errors(got, expected).values()) <= 1e-9
    assert len(graphs) == 2, "no graph was compiled as it was written"
    assert [e.pass_name for r in mstc.reports() for e in r.edits] == ["masks"]
    assert any("graphs that get it are told" in line for line in mstc.reports()[0].plan)


def test_a_mask_that_was_changed_in_between_is_kept() -> None:
    x = torch.randn(2, N, 4, dtype=torch.float64).requires_grad_()
    torch._dynamo.reset()
    mstc.clear_reports()
    fast = torch.compile(two_graphs, backend="mstc", options={"lower": "aot_eager"})
    for change in (False, True, False):
        _, expected = gradients_of(two_graphs, {"x": x}, (x, change))
        _, got = gradients_of(fast, {"x": x}, (x, change))
        assert max(gradient_errors(got, expected).values()) <= 1e-9


def test_a_rewritten_graph_takes_other_masks_too() -> None:
    """The same compiled graph, given a mask without a mark."""
    x = torch.randn(2, N, 4, dtype=torch.float64).requires_grad_()
    torch._dynamo.reset()
    make = torch.compile(lambda x: built(causal, x), backend="mstc", options={"lower": "aot_eager"})
    read = torch.compile(attend, backend="mstc", options={"lower": "aot_eager"})
    made = make(x)
    assert isinstance(marked(made), Bands)
    other = torch.ones(2, 1, N, N, dtype=torch.bool)
    for mask in (made, other, make(x), built(causal, x)):
        _, expected = gradients_of(attend, {"x": x}, (x, mask))
        _, got = gradients_of(read, {"x": x}, (x, mask))
        assert max(gradient_errors(got, expected).values()) <= 1e-9
