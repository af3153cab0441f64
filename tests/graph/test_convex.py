"""What only a later stage reads waits for it, where that is narrower; what something else needs first does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from testkit.capture import node, randn, regions_of
from testkit.exactness import chunked, compare, loops_of
from testkit.shares import every
from testkit.tiny import inputs

aten = torch.ops.aten
CLASSES = 97
HEAD, OTHER = randn(40, 4), randn(40, 4)


def later(x: Tensor) -> Tensor:
    return x + x.cumsum(1)


def test_a_head_waits_for_the_loss_that_reads_it() -> None:
    def fn(x: Tensor, head: Tensor, other: Tensor) -> Tensor:
        early, late = F.linear(x, head), F.linear(later(x.sin()), other)
        return (early * late).sum() + early.logsumexp(-1).sum()

    graph, _, regions = regions_of(fn, randn(2, 7, 4), HEAD, OTHER)
    (region,) = [r for r in regions if r.heavy]
    assert len(region.heavy) == 2 and len(region.sums) == 2
    assert node(graph, aten.logsumexp.default) in region.nodes and not region.outputs


def test_what_a_mixer_reads_first_does_not_wait() -> None:
    def fn(x: Tensor, head: Tensor, other: Tensor) -> Tensor:
        early = F.linear(x, head)
        return (early * F.linear(later(early)[..., :4], other)).sum()

    _, _, regions = regions_of(fn, randn(2, 7, 4), HEAD, OTHER)
    assert [len(r.heavy) for r in regions] == [1, 1]


def test_a_loss_that_weighs_another_comes_first() -> None:
    """The sum scales the later tokens, so the head that leads to it cannot wait for them."""

    def fn(x: Tensor, head: Tensor, other: Tensor) -> Tensor:
        early = F.linear(x, head)
        return (early * F.linear(later(x.sin()), other) * early.logsumexp(-1).sum()).sum()

    _, _, regions = regions_of(fn, randn(2, 7, 4), HEAD, OTHER)
    assert [len(r.heavy) for r in regions] == [1, 1]


def test_what_is_no_wider_than_its_inputs_does_not_wait() -> None:
    """A residual stream is read behind every mixer."""
    square = randn(4, 4)
    _, _, regions = regions_of(
        lambda x, w, v: (F.linear(x, w) * F.linear(later(x.sin()), v)).sum(), randn(2, 7, 4), square, randn(4, 4)
    )
    assert [len(r.heavy) for r in regions] == [1, 1]


class Deep(nn.Module):
    """As many mixers as asked for, and a head."""

    def __init__(self, depth: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.head = nn.Linear(8, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
            x = x + x.cumsum(1) / x.shape[1]
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("depths", every(2, [(1, 2), (2, 1), (3, 0), (0, 2), (3, 1, 2), (1, 2, 3)]))
@pytest.mark.parametrize("shifted", [False, True])
def test_teachers_of_another_depth(depths: tuple[int, ...], shifted: bool) -> None:
    """Distillation: no model's logits are ever whole, however many layers each has."""
    student, *teachers = (Deep(depth, seed) for seed, depth in enumerate(depths))
    x, labels = inputs(classes=CLASSES)

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            targets = [teacher(x) for teacher in teachers]
        logits = student(x)
        if shifted:
            logits, targets, labels = logits[:, :-1], [t[:, :-1] for t in targets], labels[:, 1:]
        total = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        for target in targets:
            total = total + F.kl_div((logits / 2).log_softmax(-1), (target / 2).softmax(-1), reduction="batchmean")
        return total

    leaves = {**dict(student.named_parameters()), "x": x.requires_grad_()}
    result = compare(loss, leaves, (x, labels), chunked(7, 5))
    result.check()
    (graph,) = result.graphs
    assert str(loops_of(graph)[-1].target).startswith("mstc.loss_loop"), result.describe()
    made = [n.meta["val"] for n in graph.graph.nodes if n.op == "call_function"]
    wide = [v.shape for v in made if isinstance(v, Tensor) and v.dim() > 2 and v.shape[-1] == CLASSES]
    assert not wide, wide


def test_results_of_one_op_stay_together() -> None:
    """One half is needed at once, the other only behind the mixer: the split stays, so both do."""

    def fn(x: Tensor, head: Tensor, other: Tensor) -> Tensor:
        now, then = F.linear(x, head).split(20, -1)
        late = F.linear(later(x + now[..., :4]), other)
        return (then * late[..., :20]).sum() + then.logsumexp(-1).sum()

    graph, _, regions = regions_of(fn, randn(2, 7, 4), HEAD, OTHER)
    split = node(graph, aten.split.Tensor)
    held = {n: r for r in regions for n in r.nodes}
    assert all(held.get(n) is held.get(split) for n in split.users)
