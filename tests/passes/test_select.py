"""Tokens that are selected of the logits are selected before the head: exact, and no logits of all tokens stay."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from testkit.exactness import Comparison, chunked, compare, loops_of
from testkit.shares import first_of
from testkit.tiny import Tiny, inputs
from testkit.versions import NEEDS_EQUAL_MASKS

CLASSES, BATCH, LENGTH = 11, 2, 23
Loss = Callable[[Tensor, Tensor], Tensor]

FEW = torch.tensor([1, 3, 5, 9, 16, 20])
EACH = torch.tensor([[0, 1, 2, 8], [3, 4, 6, 22]])  # positions of each sequence
ROWS = torch.arange(BATCH)
MASK = (torch.arange(BATCH * LENGTH) * 7 % 5 > 1).view(BATCH, LENGTH)


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Of any number of dimensions, classes last."""
    return F.cross_entropy(logits.reshape(-1, CLASSES), labels.reshape(-1))


def each(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def written(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def pieces(cut: Callable[[Tensor], Sequence[Tensor]]) -> Loss:
    """A loss on each piece, weighted."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return sum((i + 1) * ce(a, b) for i, (a, b) in enumerate(zip(cut(x), cut(y), strict=True)))  # type: ignore[return-value]

    return loss


def with_metrics(logits: Tensor, labels: Tensor) -> Tensor:
    """The same slice, written three times; once of what is detached."""
    with torch.no_grad():
        right = (logits.detach()[:, :-1].argmax(-1) == labels[:, 1:]).double().mean()
    return ce(logits[:, :-1], labels[:, 1:]) + 1e-2 * logits[:, :-1].logsumexp(-1).square().mean() + right


STATIC: dict[str, Loss] = {
    "the last tokens": lambda x, y: ce(x[:, -5:], y[:, -5:]),
    "every third token": lambda x, y: ce(x[:, ::3], y[:, ::3]),
    "tokens at positions": lambda x, y: ce(x[:, FEW], y[:, FEW]),
    "index_select": lambda x, y: ce(x.index_select(1, FEW), y[:, FEW]),
    "positions of each sequence": lambda x, y: ce(x[ROWS[:, None], EACH], y[ROWS[:, None], EACH]),
    "gather": lambda x, y: ce(x.gather(1, EACH[..., None].expand(-1, -1, CLASSES)), y.gather(1, EACH)),
    "gather, repeated": lambda x, y: ce(x.gather(1, EACH[..., None].repeat(1, 1, CLASSES)), y.gather(1, EACH)),
    "take_along_dim": lambda x, y: ce(x.take_along_dim(EACH[..., None], 1), y.gather(1, EACH)),
    "flattened, then shifted": lambda x, y: ce(x.view(-1, CLASSES)[:-1], y.view(-1)[1:]),
    "shifted, then at positions": lambda x, y: ce(x[:, :-1].flatten(0, 1)[FEW], y[:, 1:].flatten()[FEW]),
    "two stretches": lambda x, y: ce(x[:, :9], y[:, :9]) + 2 * ce(x[:, 9:], y[:, 9:]),
    "pieces": pieces(lambda x: x.chunk(2, 1)),
    "pieces of given lengths": pieces(lambda x: x.split([5, 9, 9], 1)),
    "pieces of tensor_split": pieces(lambda x: x.tensor_split(3, 1)),
    "one piece of three": lambda x, y: ce(x.split(9, 1)[1], y.split(9, 1)[1]),
    "halves of flattened tokens": pieces(lambda x: x.flatten(0, 1).chunk(2)),
    "sequences one by one": pieces(lambda x: x.unbind(0)),
    "halves of the batch": lambda x, y: ce(x[:1], y[:1]) - 0.1 * written(x, y).chunk(2)[1].mean(),
    "equal slices": with_metrics,
    "classes second": lambda x, y: F.cross_entropy(x.permute(0, 2, 1)[..., :-1], y[:, 1:]),
    "losses of tokens, sliced": lambda x, y: each(x, y)[:, 1:].mean(),
    "losses of tokens at positions": lambda x, y: each(x, y)[:, FEW].sum() / 12,
    "written losses, sliced": lambda x, y: -written(x, y)[:, -9:].mean(),
}
BY_MASK: dict[str, Loss] = {
    "mask": lambda x, y: ce(x[MASK], y[MASK]),
    "flattened mask": lambda x, y: ce(x.view(-1, CLASSES)[MASK.view(-1)], y.view(-1)[MASK.view(-1)]),
    "shifted, then a mask": lambda x, y: ce(x[:, :-1][MASK[:, 1:]], y[:, 1:][MASK[:, 1:]]),
    "nonzero": lambda x, y: ce(x[MASK.nonzero(as_tuple=True)], y[MASK.nonzero(as_tuple=True)]),
    "masked_select": lambda x, y: ce(x.masked_select(MASK[..., None]).view(-1, CLASSES), y[MASK]),
    "masked_select, expanded": lambda x, y: ce(
        x.masked_select(MASK[..., None].expand_as(x)).view(-1, CLASSES), y.masked_select(MASK)
    ),
    "mask of all classes": lambda x, y: ce(x[MASK[..., None].expand_as(x)].view(-1, CLASSES), y[MASK]),
    "losses by masked_select": lambda x, y: -written(x, y).masked_select(MASK).mean(),
    "losses of tokens under a mask": lambda x, y: each(x, y)[MASK].mean(),
}
MADE_TWICE = {
    "flattened mask",
    "shifted, then a mask",
    "masked_select",
    "masked_select, expanded",
    "mask of all classes",
}

LAST = torch.tensor([22, 10])  # of each sequence
# A few tokens beside all of them, or beside a slice that holds them: they are computed twice.
FEW_BESIDE: dict[str, Loss] = {
    "the last token": lambda x, y: ce(x, y) + x[:, -1].square().mean(),
    "the last token, after a shift": lambda x, y: ce(x[:, :-1], y[:, 1:]) + 0.1 * ce(x[:, -1], y[:, 0]),
    "two tokens and a shift": lambda x, y: ce(x[:, :-1], y[:, 1:]) + ce(x[:, -1], y[:, 0]) + ce(x[:, -2], y[:, 1]),
    "one token of each sequence": lambda x, y: ce(x, y) + ce(x[ROWS, LAST], y[:, 0]),
    "two classes of one token": lambda x, y: ce(x, y) + F.cross_entropy(x[ROWS, LAST][:, [3, 9]], y[:, 0] % 2),
    "detached": lambda x, y: ce(x, y) * (1 + x.detach()[:, -1].amax()),
    "overlapping slices": lambda x, y: ce(x[:, :-1], y[:, 1:]) + ce(x[:, 1:], y[:, :-1]) + x[:, -1].square().mean(),
}


def run(loss: Loss, lower: str = "eager") -> Comparison:
    model = Tiny(classes=CLASSES)
    x, labels = inputs(BATCH, LENGTH)
    leaves = {**dict(model.named_parameters()), "x": x.requires_grad_()}
    return compare(lambda x, y: loss(model(x), y), leaves, (x, labels), chunked(7, 5, lower))


def check_chunked(result: Comparison) -> None:
    """One graph, equal numbers; the head in loops whose gradients come with the forward, no logits outside."""
    result.check()
    (graph,) = result.graphs
    assert any(str(n.target).startswith("mstc.loss_loop") for n in loops_of(graph)), result.describe()
    made = [n.meta["val"] for n in graph.graph.nodes if n.op == "call_function"]
    wide = [v.shape for v in made if isinstance(v, Tensor) and v.is_floating_point() and v.shape[-1:] == (CLASSES,)]
    assert all(len(shape) == 1 for shape in wide), wide  # the bias's gradient


STATIC_FEW = (
    "the last tokens",
    "tokens at positions",
    "index_select",
    "gather",
    "shifted, then at positions",
    "pieces",
    "equal slices",
    "losses of tokens, sliced",
)
MASKS_FEW = ("mask", "shifted, then a mask", "masked_select", "losses of tokens under a mask")


def _marks_of(name: str) -> list[pytest.MarkDecorator]:
    few = [] if name in MASKS_FEW else [pytest.mark.slow]
    return [*few, NEEDS_EQUAL_MASKS] if name in MADE_TWICE else few


@pytest.mark.parametrize("name", first_of(STATIC, STATIC_FEW))
def test_positions(name: str) -> None:
    check_chunked(run(STATIC[name]))


@pytest.mark.parametrize("name", [pytest.param(n, marks=_marks_of(n)) for n in BY_MASK])
def test_masks(name: str) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check_chunked(run(BY_MASK[name], "aot_eager"))


def test_a_mask_makes_no_sequence_of_the_batch() -> None:
    """It flattens texts and tokens alike, but ties none of them to another: a wide head is cut by tokens."""
    model = Tiny(classes=97)
    x, labels = inputs(BATCH, LENGTH)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)[:, :-1]
        return (logits.logsumexp(-1) - logits.gather(-1, y[:, 1:, None])[..., 0])[MASK[:, 1:]].mean()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = compare(loss, dict(model.named_parameters()), (x, labels), chunked(7, 5, "aot_eager"))
    result.check()
    assert result.loops == 3, result.describe()  # along the batch all of it is one


def test_a_mask_before_ops_that_ask_for_rows() -> None:
    """PyTorch traces no ``logsumexp`` of a length that data decide: refused, and right."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        result = run(
            lambda x, y: x.softmax(-1)[MASK].square().sum() + (x - x.logsumexp(-1, True))[MASK].mean(), "aot_eager"
        )
    result.check()
    reasons = [r.reason for report in result.reports for r in report.refusals]
    assert any("as many tokens as data decide" in r for r in reasons), result.describe()


def test_one_token_of_each_sequence() -> None:
    """What is left is too short for chunks; nothing is made for the other tokens."""
    last = torch.tensor([3, -5])
    for loss in (lambda x, y: ce(x[ROWS, last], y[ROWS, last]), lambda x, y: ce(x[:, -1], y[:, -1])):
        result = run(loss)
        result.check()
        made = [n.meta["val"] for n in result.graphs[0].graph.nodes if n.op == "call_function"]
        wide = [v.shape for v in made if isinstance(v, Tensor) and v.shape[-1:] == (CLASSES,)]
        assert wide and all(shape.numel() <= BATCH * CLASSES for shape in wide)


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: ce(x[:, FEW], y[:, FEW]) + x.logsumexp(-1).square().mean(),
        lambda x, y: ce(x, y) + x[:, -1].square().mean() + x.cumsum(1).square().mean(),
        lambda x, y: ce(x[:, :-1], y[:, 1:]) + ce(x[:, 1:], y[:, :-1]),
        lambda x, y: ce(x[:, torch.arange(60) % LENGTH], y[:, torch.arange(60) % LENGTH]),
    ],
    ids=["read whole too", "the last token of whole logits", "overlapping", "more than all"],
)
def test_what_would_not_pay_stays(loss: Loss) -> None:
    result = run(loss)
    result.check()
    assert any(r.pass_name == "select" for report in result.reports for r in report.refusals), result.describe()


@pytest.mark.parametrize("name", FEW_BESIDE)
def test_a_few_tokens_beside_all(name: str) -> None:
    result = run(FEW_BESIDE[name], "aot_eager")
    result.check()
    (graph,) = result.graphs
    assert any(str(n.target).startswith("mstc.loss_loop") for n in loops_of(graph)), result.describe()
    made = [n.meta["val"] for n in graph.graph.nodes if n.op == "call_function"]
    wide = [v.shape for v in made if isinstance(v, Tensor) and v.is_floating_point() and v.shape[-1:] == (CLASSES,)]
    assert wide and all(shape.numel() <= BATCH * CLASSES for shape in wide), wide


def test_halves_without_gradients_behind_a_shift() -> None:
    """DPO's reference: what is detached stays so where its head is copied."""

    def of_sequences(logits: Tensor, labels: Tensor) -> Tensor:
        return written(logits[:, :-1], labels[:, 1:]).sum(-1)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            reference = of_sequences(x.flip(0), y).chunk(2)
        ours = of_sequences(x, y).chunk(2)
        return -F.logsigmoid((ours[0] - ours[1]) - (reference[0] - reference[1])).mean()

    result = run(loss, "aot_eager")
    result.check()
    assert result.loops > 2 and any(e.pass_name == "select" for r in result.reports for e in r.edits)


def test_positions_out_of_range_raise() -> None:
    model = Tiny(classes=CLASSES)
    x, labels = inputs(BATCH, LENGTH)

    def fn(x: Tensor, labels: Tensor, at: Tensor) -> Tensor:
        return ce(model(x)[ROWS, at], labels[ROWS, 0])

    step = torch.compile(fn, backend="mstc", options=chunked(7, 5, "eager"))
    step(x, labels, torch.tensor([3, -LENGTH])).backward()
    with pytest.raises(IndexError):
        step(x, labels, torch.tensor([3, LENGTH]))
