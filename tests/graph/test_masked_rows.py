"""Selections by masks of whole rows are reads of rows; other masks, and the lengths that data decide, stay right."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from testkit.exactness import compare

ROWS = torch.tensor([[True, False, True], [False, False, True]])
ONE = torch.tensor([[False, True, False], [False, False, False]])
EACH = (torch.arange(24) % 5 > 1).view(2, 3, 4)

READ_BY_ROW: dict[str, Callable[[Tensor], Tensor]] = {
    "broadcast": lambda x: x.masked_select(ROWS[..., None]),
    "expanded": lambda x: x.masked_select(ROWS[..., None].expand(2, 3, 4)),
    "along two dimensions": lambda x: x.masked_select(ROWS[:, :1, None]),
    "index": lambda x: x[ROWS[..., None].expand_as(x)],
    "all dimensions": lambda x: x.masked_select(EACH),
    "computed": lambda x: x.masked_select((x.detach()[..., :1] > 0).expand_as(x)),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "along the first": lambda x: x.masked_select(EACH[:1]),
    "of fewer dimensions": lambda x: x.masked_select(EACH[0]),
    "the value is repeated": lambda x: x[..., :1].masked_select(ONE[..., None].expand(2, 3, 4)),
    "index by each": lambda x: x[EACH],
}


def _targets(select: Callable[[Tensor], Tensor]) -> list[str]:
    """What was lowered, compared with eager."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        taken = select(x)
        return (taken.square() * torch.arange(taken.shape[0])).sum() + taken.shape[0]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = compare(loss, {"x": x}, (x,))
    result.check()
    (graph,) = result.graphs
    return [str(n.target) for n in graph.graph.nodes if "index" in str(n.target) or "masked_select" in str(n.target)]


@pytest.mark.parametrize("name", READ_BY_ROW)
def test_reads_rows(name: str) -> None:
    assert _targets(READ_BY_ROW[name]) == ["aten.index.Tensor"]


@pytest.mark.parametrize("name", OTHERS)
def test_stays(name: str) -> None:
    expected = "aten.index.Tensor" if "index" in name else "aten.masked_select.default"
    assert _targets(OTHERS[name]) == [expected]
