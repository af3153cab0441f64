"""Targets of all classes, reads of one class of each token and soft embeddings, as people write them.

Every one runs with its head chunk by chunk, gradients with the forward, and nothing of all classes stands outside.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from testkit.exactness import Comparison, chunked, compare, loops_of
from testkit.shares import every
from testkit.tiny import Tiny, inputs

CLASSES, BATCH, LENGTH = 97, 2, 23
TOKENS = BATCH * LENGTH
Loss = Callable[[Tensor, Tensor], Tensor]


def _of_teacher() -> tuple[Tensor, Tensor]:
    """The probabilities of three classes of each token, and which."""
    generator = torch.Generator().manual_seed(5)
    best = torch.rand(BATCH, LENGTH, CLASSES, dtype=torch.float64, generator=generator).topk(3, -1)
    return best.values.softmax(-1), best.indices


BEST, AT = _of_teacher()
TABLE = nn.Parameter(torch.randn(CLASSES, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(6)))


def kl(logits: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")


def straight_through(logits: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return torch.zeros_like(p).scatter_(-1, p.argmax(-1, keepdim=True), 1.0) - p.detach() + p


def filled(logits: Tensor, labels: Tensor) -> Tensor:
    target = torch.empty(TOKENS, CLASSES, dtype=logits.dtype).fill_(0.1 / CLASSES)
    return kl(logits.flatten(0, 1), target.scatter_(1, labels.flatten()[:, None], 0.9))


def with_margin(logits: Tensor, labels: Tensor) -> Tensor:
    flat = logits.flatten(0, 1).clone()
    flat[torch.arange(TOKENS), labels.flatten()] -= 0.4
    return F.cross_entropy(flat, labels.flatten())


def written_to(logits: Tensor, labels: Tensor) -> Tensor:
    target = torch.zeros(TOKENS, CLASSES, dtype=logits.dtype)
    target[torch.arange(TOKENS), labels.flatten()] = 1
    return kl(logits.flatten(0, 1), target)


TARGETS: dict[str, Loss] = {
    "a teacher's best classes": lambda x, y: kl(x, torch.zeros(x.shape, dtype=x.dtype).scatter(-1, AT, BEST)),
    "the same, flattened": lambda x, y: kl(
        x.flatten(0, 1), x.new_zeros(TOKENS, CLASSES).scatter_(1, AT.view(-1, 3), BEST.view(-1, 3))
    ),
    "labels in zeros": lambda x, y: kl(x.flatten(0, 1), x.new_zeros(TOKENS, CLASSES).scatter(1, y.view(-1, 1), 1.0)),
    "labels in what is filled": filled,
    "labels written by position": written_to,
    "repeated": lambda x, y: F.mse_loss(x.sigmoid(), (y.double() / CLASSES)[..., None].repeat(1, 1, CLASSES)),
    "one row, repeated": lambda x, y: kl(x, torch.full((CLASSES,), 1 / CLASSES).double().repeat(BATCH, LENGTH, 1)),
}
READS: dict[str, Loss] = {
    "of flattened tokens": lambda x, y: -x.flatten(0, 1).log_softmax(-1)[torch.arange(TOKENS), y.flatten()].mean(),
    "of texts and tokens": lambda x, y: (
        -x.log_softmax(-1)[torch.arange(BATCH)[:, None], torch.arange(LENGTH), y].mean()
    ),
    "counted from the back": lambda x, y: (
        -x.flatten(0, 1).log_softmax(-1)[torch.arange(0, TOKENS), -1 - y.flatten()].mean()
    ),
    "the first class": lambda x, y: -x.flatten(0, 1).log_softmax(-1)[torch.arange(TOKENS), 0].mean(),
    "a margin": with_margin,
}
SOFT: dict[str, Loss] = {
    "probabilities": lambda x, y: (x.softmax(-1) @ TABLE).square().mean(),
    "straight through": lambda x, y: (straight_through(x) @ TABLE - F.embedding(y, TABLE)).square().mean(),
    "beside cross-entropy": lambda x, y: (
        F.cross_entropy(x.flatten(0, 1), y.flatten()) + (x.softmax(-1) @ TABLE).square().mean()
    ),
    "and a head behind": lambda x, y: F.cross_entropy((x.softmax(-1) @ TABLE @ TABLE.t()).flatten(0, 1), y.flatten()),
}


def run(loss: Loss, lower: str = "aot_eager") -> Comparison:
    model = Tiny(classes=CLASSES)
    x, labels = inputs(BATCH, LENGTH, classes=CLASSES)
    leaves = {**dict(model.named_parameters()), "x": x.requires_grad_(), "table": TABLE}
    result = compare(lambda x, y: loss(model(x), y), leaves, (x, labels), chunked(7, 5, lower))
    result.check()
    return result


@pytest.mark.parametrize("name", [*TARGETS, *READS, *SOFT])
def test_in_chunks(name: str) -> None:
    result = run((TARGETS | READS | SOFT)[name])
    (graph,) = result.graphs
    assert str(loops_of(graph)[-1].target).startswith("mstc.loss_loop"), result.describe()
    made = [n.meta["val"] for n in graph.graph.nodes if n.op == "call_function"]
    wide = [v.shape for v in made if isinstance(v, Tensor) and v.is_floating_point() and v.numel() >= TOKENS * CLASSES]
    assert not wide, wide


@pytest.mark.parametrize("name", every(2, ["the same, flattened", "of flattened tokens", "straight through"]))
def test_through_inductor(name: str) -> None:
    run((TARGETS | READS | SOFT)[name], "inductor")


def test_dynamic_lengths() -> None:
    """One graph for all lengths; the rows are still counted by a length."""
    model = Tiny(classes=CLASSES)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        flat = model(x).flatten(0, 1)
        rows = torch.arange(flat.shape[0])
        target = flat.new_zeros(flat.shape).scatter_(1, y.view(-1, 1), 1.0)
        return kl(flat, target) - flat.log_softmax(-1)[rows, y.flatten()].mean()

    step = torch.compile(loss, backend="mstc", options=chunked(7, 5, "aot_eager"), dynamic=True)
    for length in (LENGTH, 31):
        x, labels = inputs(BATCH, length, classes=CLASSES)
        results = []
        for fn in (loss, step):
            model.zero_grad()
            value = fn(x, labels)
            value.backward()
            results.append([value.detach(), *(p.grad for p in model.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_a_class_out_of_range_raises() -> None:
    model = Tiny(classes=CLASSES)
    x, labels = inputs(BATCH, LENGTH, classes=CLASSES)
    step = torch.compile(lambda x, y: READS["of flattened tokens"](model(x), y), backend="mstc", options=chunked(7, 5))
    labels[1, 3] = CLASSES
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        step(x, labels)
