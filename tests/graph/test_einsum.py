"""Products written as einsum count as such: models made of them run in loops as others do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mstc.graph.costs import is_heavy, matmul_flops
from mstc.graph.einsum import contracted, names_of
from testkit.capture import node, normal_graph, randn
from testkit.exactness import chunked, compare, loops_of

aten = torch.ops.aten
WIDTH, HEADS, INNER, CLASSES = 8, 2, 24, 11


class Block(nn.Module):
    """Attention, an MLP and a head in which every product is an einsum."""

    def __init__(self, dots: bool) -> None:
        super().__init__()
        shapes = [(WIDTH, HEADS, 4)] * 3 + [(HEADS, 4, WIDTH), (WIDTH, INNER), (INNER, WIDTH), (CLASSES, WIDTH)]
        self.weights = nn.ParameterList(0.3 * randn(*s) for s in shapes)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH).double() for _ in range(3))
        self.dots = dots

    def product(self, equation: str, *factors: Tensor) -> Tensor:
        return torch.einsum(equation.replace("bt", "...") if self.dots else equation, *factors)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        q, k, v, out, up, down, head = self.weights
        a = self.norms[0](x)
        query, key, value = (self.product("btd,dhk->bthk", a, w) for w in (q, k, v))
        scores = torch.einsum("bihk,bjhk->bhij", query, key).softmax(-1)
        x = x + self.product("bthk,hkd->btd", torch.einsum("bhij,bjhk->bihk", scores, value), out)
        x = x + self.product("bti,id->btd", F.gelu(self.product("btd,di->bti", self.norms[1](x), up)), down)
        logits = self.product("btd,vd->btv", self.norms[2](x), head)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


@pytest.mark.parametrize(
    ("dots", "lower"),
    [
        (False, "aot_eager"),
        (True, "aot_eager"),
        pytest.param(True, "inductor", marks=[pytest.mark.inductor, pytest.mark.slow]),
    ],
    ids=["letters", "ellipsis", "inductor"],
)
def test_a_model_of_einsums_runs_in_loops(dots: bool, lower: str) -> None:
    torch.manual_seed(0)
    model = Block(dots)
    x, labels = randn(2, 23, WIDTH), torch.randint(0, CLASSES, (2, 23))
    result = compare(
        model, {**dict(model.named_parameters()), "x": x.requires_grad_()}, (x, labels), chunked(7, 5, lower)
    )
    result.check()
    (graph,) = result.graphs
    assert any(str(n.target).startswith("mstc.loss_loop") for n in loops_of(graph))
    left = [n.args[0] for n in graph.graph.nodes if n.target is aten.einsum.default]
    assert left == ["bihk,bjhk->bhij", "bhij,bjhk->bihk"], result.describe()  # too few queries for chunks


@pytest.mark.parametrize(
    ("equation", "shapes", "flops"),
    [
        ("bid,df->bif", [(2, 3, 4), (4, 5)], 2 * 2 * 3 * 4 * 5),
        ("...d, fd -> ...f", [(2, 3, 4), (5, 4)], 2 * 2 * 3 * 4 * 5),
        ("id,dhk", [(3, 4), (4, 2, 5)], 2 * 3 * 4 * 2 * 5),
        ("...ij,...jk", [(2, 1, 3, 4), (6, 4, 5)], 2 * 2 * 6 * 3 * 4 * 5),
        ("bi,bi->bi", [(2, 3), (2, 3)], 0),
        ("i,j->ij", [(3,), (4,)], 0),
        ("bi->b", [(2, 3)], 0),
    ],
)
def test_flops(equation: str, shapes: list[tuple[int, ...]], flops: int) -> None:
    graph = normal_graph(lambda *factors: torch.einsum(equation, *factors), *(randn(*s) for s in shapes))
    found = node(graph, aten.einsum.default)
    assert matmul_flops(found) == flops and is_heavy(found) == bool(flops)


def test_names() -> None:
    graph = normal_graph(lambda a, b: torch.einsum("b...d, ...de -> ...be", a, b), randn(2, 1, 3, 4), randn(5, 1, 4, 6))
    found = node(graph, aten.einsum.default)
    assert names_of(found) == ([("b", 2, 1, "d"), (2, 1, "d", "e")], (2, 1, "b", "e"))
    assert contracted(found) == {"d"}
