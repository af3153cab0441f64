"""Losses of overlapping slices of the logits, or of a slice beside all of them, share one head in chunks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from testkit.exactness import Comparison, chunked, compare, loops_of
from testkit.shares import first_of
from testkit.tiny import Tiny, inputs

CLASSES, BATCH, LENGTH = 11, 2, 23
Loss = Callable[[Tensor, Tensor], Tensor]
TEACHER = torch.randn(BATCH, LENGTH, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).softmax(
    -1
)


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.reshape(-1, CLASSES), labels.reshape(-1))


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return ce(logits[:, :-1], labels[:, 1:])


def written(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def kl(logits: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), target, reduction="batchmean")


def of_sequences(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of sequences without their last tokens, and an entropy of all tokens."""
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return -F.logsigmoid(written(logits[:, :-1], labels[:, 1:]).sum(-1)).mean() + 0.1 * entropy.mean()


MEET: dict[str, Loss] = {
    "a z-loss of all": lambda x, y: shifted(x, y) + x.logsumexp(-1).square().mean(),
    "the same loss of all": lambda x, y: shifted(x, y) + ce(x, y),
    "overlapping slices": lambda x, y: shifted(x, y) + ce(x[:, 1:], y[:, :-1]),
    "several shifts": lambda x, y: shifted(x, y) + 0.3 * ce(x[:, :-2], y[:, 2:]) + 0.1 * ce(x[:, :-3], y[:, 3:]),
    "the last ones": lambda x, y: ce(x[:, -5:], y[:, -5:]) + ce(x, y),
    "every third": lambda x, y: ce(x[:, 1::3], y[:, 1::3]) + ce(x, y),
    "flattened": lambda x, y: ce(x.view(-1, CLASSES)[:-1], y.view(-1)[1:]) + ce(x, y),
    "the same slice of a teacher's": lambda x, y: kl(x[:, :-1], TEACHER[:, :-1]) + ce(x, y),
    "a mean": lambda x, y: x[:, 2:].logsumexp(-1).square().mean() + ce(x, y),
    "a sum of all classes": lambda x, y: 1e-2 * x[:, 2:].square().sum() + ce(x, y),
    "counted": lambda x, y: ce(x, y) * (1 + (x[:, :-1].detach().argmax(-1) == y[:, 1:]).sum()),
    "classes second": lambda x, y: F.cross_entropy(x.permute(0, 2, 1)[..., :-1], y[:, 1:]) + ce(x, y),
}
APART: dict[str, Loss] = {
    "kept": lambda x, y: written(x[:, :-1], y[:, 1:]).exp().prod(-1).sum() + ce(x, y),
    "of sequences": of_sequences,
}
LEFT: dict[str, tuple[Loss, str]] = {
    "two slices in one loss": (lambda x, y: kl(x[:, :-1], x[:, 1:]) + ce(x, y), "as wide"),
    "another slice of a teacher's": (lambda x, y: kl(x[:, :-1], TEACHER[:, 1:]) + ce(x, y), "as wide"),
    "wide": (lambda x, y: x[:, :-1].cumsum(1).square().mean() + ce(x, y), "is read whole"),
}


def run(loss: Loss, lower: str = "aot_eager") -> Comparison:
    model = Tiny(classes=CLASSES)
    x, labels = inputs(BATCH, LENGTH)
    leaves = {**dict(model.named_parameters()), "x": x.requires_grad_()}
    result = compare(lambda x, y: loss(model(x), y), leaves, (x, labels), chunked(7, 5, lower))
    result.check()
    return result


def kinds(result: Comparison) -> list[str]:
    (graph,) = result.graphs
    return [str(n.target) for n in loops_of(graph)]


def has_all_logits(result: Comparison) -> bool:
    made = [n.meta["val"] for n in result.graphs[0].graph.nodes if n.op == "call_function"]
    wide = [v.shape for v in made if isinstance(v, Tensor) and v.is_floating_point() and v.shape[-1:] == (CLASSES,)]
    return any(len(shape) > 1 for shape in wide)


@pytest.mark.parametrize("name", MEET)
def test_one_head(name: str) -> None:
    result = run(MEET[name])
    assert kinds(result)[-1].startswith("mstc.loss_loop") and len(kinds(result)) == 3, result.describe()
    assert any(e.pass_name == "sink_slices" for r in result.reports for e in r.edits)
    assert not has_all_logits(result)


@pytest.mark.inductor
@pytest.mark.parametrize("name", first_of(["overlapping slices", "every third"], ["every third"]))
def test_through_inductor(name: str) -> None:
    """Slices that start behind the first token: Inductor fails on rounded and clamped positions as an index."""
    assert kinds(run(MEET[name], "inductor"))[-1].startswith("mstc.loss_loop")


@pytest.mark.parametrize("name", APART)
def test_losses_of_tokens_leave_the_loop(name: str) -> None:
    result = run(APART[name])
    assert len(kinds(result)) == 3, result.describe()
    assert any(e.pass_name == "sink_slices" for r in result.reports for e in r.edits)
    assert not has_all_logits(result)


@pytest.mark.parametrize("name", LEFT)
def test_stays(name: str) -> None:
    loss, reason = LEFT[name]
    result = run(loss)
    assert any(reason in r.reason for report in result.reports for r in report.refusals), result.describe()


def test_a_weight_behind_the_slice_stays() -> None:
    torch.manual_seed(0)
    head, scale = nn.Linear(4, CLASSES).double(), nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    x, labels = inputs(BATCH, LENGTH, width=4)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = head(x)
        return ce(logits[:, :-1] / scale, y[:, 1:]) + ce(logits, y)

    result = compare(loss, {"x": x.requires_grad_(), "scale": scale, "w": head.weight}, (x, labels), chunked(7, 5))
    result.check()
    assert any("gets a gradient of each token" in r.reason for report in result.reports for r in report.refusals)


def test_nothing_of_what_is_not_taken() -> None:
    """The derivative is infinite where the slice ends."""
    torch.manual_seed(0)
    head = nn.Linear(4, CLASSES, bias=False).double()
    x, labels = inputs(BATCH, LENGTH, width=4)
    x[:, -1] = 0

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = head(x)
        return logits[:, :-1].square().sum(-1).sqrt().mean() + ce(logits, y)

    result = compare(loss, {"x": x.requires_grad_(), "w": head.weight}, (x, labels), chunked(7, 5))
    result.check()
    assert any(e.pass_name == "sink_slices" for r in result.reports for e in r.edits), result.describe()


def test_dynamic_lengths() -> None:
    model = Tiny(classes=CLASSES)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return MEET["several shifts"](model(x), y)

    step = torch.compile(loss, backend="mstc", options=chunked(7, 5, "aot_eager"), dynamic=True)
    for length in (LENGTH, 31):
        x, labels = inputs(BATCH, length)
        results = []
        for fn in (loss, step):
            model.zero_grad()
            value = fn(x, labels)
            value.backward()
            results.append([value.detach(), *(p.grad for p in model.parameters())])
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)
