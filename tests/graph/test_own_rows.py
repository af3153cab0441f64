"""``x[arange(n), i]`` is a gather where rows are counted in order; anything else stays an index."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from testkit.exactness import chunked, compare

X, I = torch.randn(3, 5, dtype=torch.float64), torch.tensor([4, -5, -1])
CUBE, EACH = torch.randn(2, 3, 5, dtype=torch.float64), torch.tensor([[0, -1, 2], [4, 3, -5]])

GATHERED: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "rows": (lambda x: x[torch.arange(3), I], X),
    "counted in steps": (lambda x: x[torch.arange(0, 3, 1), I], X),
    "one class for all": (lambda x: x[torch.arange(3), I[:1]], X),
    "int32": (lambda x: x[torch.arange(3), I.int()], X),
    "two dimensions": (lambda x: x[torch.arange(2)[:, None], torch.arange(3), EACH], CUBE),
}
OTHERS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "in another order": (lambda x: x[torch.arange(2, -1, -1), I], X),
    "fewer": (lambda x: x[torch.arange(2), I[:2]], X),
    "from the second on": (lambda x: x[torch.arange(1, 3), I[:2]], X),
    "exchanged": (lambda x: x[torch.arange(2), torch.arange(3)[:, None], EACH.t()], CUBE),
    "all pairs": (lambda x: x[torch.arange(3)[:, None], I], X),
    "rows of a cube": (lambda x: x[torch.arange(2), torch.tensor([1, 0])], CUBE),
}


def _run(fn: Callable[[Tensor], Tensor], x: Tensor) -> list[str]:
    x = x.clone().requires_grad_()
    result = compare(lambda x: (fn(x) * 1.5).square().sum(), {"x": x}, (x,), chunked(7, 5, "eager"))
    result.check()
    return [str(n.target) for n in result.graphs[0].graph.nodes]


@pytest.mark.parametrize("name", GATHERED)
def test_gathers(name: str) -> None:
    targets = _run(*GATHERED[name])
    assert "aten.gather.default" in targets and "aten.index.Tensor" not in targets


@pytest.mark.parametrize("name", OTHERS)
def test_stays_an_index(name: str) -> None:
    assert "aten.index.Tensor" in _run(*OTHERS[name])


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("value", [torch.tensor(2.0), torch.tensor([1.0, 2.0, 3.0])], ids=["one", "each"])
def test_writes_are_scatters(adds: bool, value: Tensor) -> None:
    targets = _run(lambda x: x.index_put((torch.arange(3), I), value.double(), adds), X)
    assert not any("index_put" in t for t in targets) and any("scatter" in t for t in targets)
