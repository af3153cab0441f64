"""Heads and losses in the forms in which models write them, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from torch import Tensor
from torch.nn import functional as F

from testkit.exactness import Comparison, chunked, compare, gradient_errors, gradients_of
from testkit.tiny import Tiny, inputs

CLASSES = 11


def flat(logits: Tensor, labels: Tensor, **options: object) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)  # type: ignore[arg-type]


def ignoring(labels: Tensor) -> Tensor:
    """Every third label is not counted."""
    return labels.masked_fill(torch.arange(labels.shape[1]) % 3 == 0, -100)


def weights(logits: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, CLASSES, dtype=logits.dtype)


def own_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    picked = logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (logits.logsumexp(-1) - picked).mean()


def poly(logits: Tensor, labels: Tensor) -> Tensor:
    """Poly-1: cross-entropy and a multiple of 1 - p of the label."""
    taken = (F.one_hot(labels, CLASSES) * logits.softmax(-1)).sum(-1)
    return (F.cross_entropy(logits.transpose(1, 2), labels, reduction="none") + 1.5 * (1 - taken)).mean()


def few_of_teacher(logits: Tensor, labels: Tensor) -> Tensor:
    """Distillation on the teacher's best classes."""
    best, at = logits.detach().flip(-1).topk(4, -1)
    ours = logits.gather(-1, at).log_softmax(-1)
    return F.kl_div(ours, best.log_softmax(-1), log_target=True, reduction="batchmean")


def unlikely(logits: Tensor, labels: Tensor) -> Tensor:
    """Unlikelihood of the tokens that came before."""
    logp = logits.log_softmax(-1)
    before = F.one_hot(labels, CLASSES).cumsum(1).clamp(max=1).to(logp.dtype)
    return own_cross_entropy(logits, labels) - (torch.log1p(-logp.exp().clamp(max=0.999)) * before).sum(-1).mean()


def sparse(logits: Tensor, labels: Tensor) -> Tensor:
    """1.5-entmax by bisection."""
    z = logits / 2
    low, high = z.amax(-1, keepdim=True) - 1, z.amax(-1, keepdim=True) - CLASSES**-0.5
    for _ in range(6):
        middle = (low + high) / 2
        above = (z - middle).clamp(min=0).square().sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    p = (z - low).clamp(min=0).square()
    return -((p / p.sum(-1, keepdim=True)).gather(-1, labels[..., None]) + 1e-3).log().mean()


def moved_mass(logits: Tensor, labels: Tensor) -> Tensor:
    """The squared distance of the distributions' sums (EMD over ordered classes)."""
    target = F.one_hot(labels, CLASSES).to(logits.dtype) * 0.9 + 0.1 / CLASSES
    return (logits.softmax(-1).cumsum(-1) - target.cumsum(-1)).square().sum(-1).sqrt().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": flat,
    "sum": lambda x, y: flat(x, y, reduction="sum"),
    "mean of none": lambda x, y: flat(x, y, reduction="none").mean(),
    "sum of none over a count": lambda x, y: flat(x, y, reduction="none").sum() / 40,
    "weighted by token": lambda x, y: (flat(x, y, reduction="none") * (y.flatten() % 2)).sum(),
    "ignore_index": lambda x, y: flat(x, ignoring(y)),
    "another ignore_index": lambda x, y: flat(x, y, ignore_index=3),
    "label smoothing": lambda x, y: flat(x, y, label_smoothing=0.1),
    "label smoothing and ignored": lambda x, y: flat(x, ignoring(y), label_smoothing=0.1),
    "class weights": lambda x, y: flat(x, ignoring(y), weight=weights(x)),
    "class weights and smoothing": lambda x, y: flat(x, ignoring(y), weight=weights(x), label_smoothing=0.2),
    "class probabilities": lambda x, y: F.cross_entropy(
        x.flatten(0, 1), F.one_hot(y, CLASSES).to(x.dtype).flatten(0, 1)
    ),
    "classes second": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "softcap": lambda x, y: flat(torch.tanh(x / 5) * 5, y),
    "logit scale": lambda x, y: flat(x * 0.25, y),
    "temperature": lambda x, y: flat(x / 2.0, y),
    "float32 logits": lambda x, y: flat(x.float().double(), y),
    "shift after the head": lambda x, y: flat(x[:, :-1], y[:, 1:]),
    "shift after the head, contiguous": lambda x, y: flat(x[..., :-1, :].contiguous(), y[..., 1:].contiguous()),
    "shift by padded labels": lambda x, y: flat(x, F.pad(y, (0, 1), value=-100)[:, 1:]),
    "log-softmax and nll": lambda x, y: F.nll_loss(F.log_softmax(x, -1).flatten(0, 1), y.flatten()),
    "written out": own_cross_entropy,
    "z-loss beside": lambda x, y: flat(x, y) + 1e-2 * x.logsumexp(-1).square().mean(),
    "entropy beside": lambda x, y: flat(x, y) - 0.1 * (x.softmax(-1) * x.log_softmax(-1)).sum(-1).mean(),
    "distillation": lambda x, y: F.kl_div(x.log_softmax(-1), x.detach().flip(-1).softmax(-1), reduction="batchmean"),
    "two losses": lambda x, y: flat(x, y) + 0.3 * flat(x, y.roll(1, 1)),
    "Poly-1": poly,
    "top-k distillation": few_of_teacher,
    "unlikelihood": unlikely,
    "entmax": sparse,
    "earth mover's distance": moved_mass,
    "squared error": lambda x, y: F.mse_loss(x, x.detach().roll(1, 1)),
    "binary": lambda x, y: F.binary_cross_entropy_with_logits(x, F.one_hot(y, CLASSES).to(x.dtype)),
    "sequence mean of token sums": lambda x, y: flat(x, y, reduction="none").view(y.shape).sum(1).mean(),
    "a power of the loss": lambda x, y: flat(x, y).square() * 2.5,
}


def run(loss: Callable[[Tensor, Tensor], Tensor], model: Tiny | None = None, lower: str = "eager") -> Comparison:
    made = model or Tiny(classes=CLASSES)

    def step(x: Tensor, labels: Tensor) -> Tensor:
        return loss(made(x), labels)

    x, labels = inputs()
    leaves = {**dict(made.named_parameters()), "x": x.requires_grad_()}
    return compare(step, leaves, (x, labels), chunked(7, 5, lower))


@pytest.mark.parametrize("name", LOSSES)
def test_forms_of_loss(name: str) -> None:
    result = run(LOSSES[name])
    print(result.describe())
    result.check()


@pytest.mark.parametrize(
    "name",
    [
        *("mean", "sum", "ignore_index", "class weights", "softcap", "logit scale", "shift by padded labels", "Poly-1"),
        *("class probabilities", "top-k distillation", "unlikelihood", "entmax", "earth mover's distance"),
    ],
)
def test_gradients_come_with_the_forward(name: str) -> None:
    """The forms that this head is built for run as a loss loop: no logits outlive a chunk."""
    result = run(LOSSES[name])
    assert [n for n in result.graphs[0].graph.nodes if str(n.target).startswith("mstc.loss_loop")], result.describe()


def test_without_bias() -> None:
    run(flat, Tiny(classes=CLASSES, bias=False)).check()


def test_shift_before_the_head() -> None:
    model = Tiny(classes=CLASSES)

    def step(x: Tensor, labels: Tensor) -> Tensor:
        return flat(model.head(model.features(x)[:, :-1]), labels[:, 1:])

    compare(step, dict(model.named_parameters()), inputs(), chunked(7, 5, "eager")).check()


def test_shift_of_a_head_whose_input_others_read() -> None:
    """A value head and a second loss beside the logits: the slice still moves before the product with the head."""
    model = Tiny(classes=CLASSES)
    beside = torch.nn.Linear(8, 1, dtype=torch.float64)

    def step(x: Tensor, labels: Tensor) -> Tensor:
        h = torch.tanh(model.features(x))
        quantized = h + (h.round() - h).detach()
        return flat(model.head(quantized)[:, :-1], labels[:, 1:]) + beside(quantized).square().mean() + h.abs().mean()

    leaves = {**dict(model.named_parameters()), **{f"beside.{n}": p for n, p in beside.named_parameters()}}
    result = compare(step, leaves, inputs(), chunked(7, 5, "eager"))
    result.check()
    assert any("moves before the head" in e.what for r in result.reports for e in r.edits), result.describe()
    made = [n.meta["val"].shape for gm in result.graphs for n in gm.graph.nodes if is_made(n)]
    assert not any(len(shape) > 1 and shape[-1] == CLASSES for shape in made), made


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
def test_a_kept_output_and_its_gradient_are_two_inputs(lower: str) -> None:
    """A gate reads the residual stream in the loop that makes it, which is kept: its weight's gradient needs it."""
    model, gate = Tiny(classes=CLASSES), torch.nn.Linear(8, 1, dtype=torch.float64)
    queries = torch.nn.Linear(8, 8, dtype=torch.float64)

    def block(x: Tensor) -> Tensor:
        q = queries(model.norms[0](x))[:, None]
        x = x + F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]
        return x + model.downs[0](F.gelu(model.ups[0](model.norms[1](x))))

    def step(x: Tensor, labels: Tensor) -> Tensor:
        h = block(x)
        return (gate(h) * block(h)).square().mean()

    modules = {"queries": queries, "gate": gate, "norms": model.norms, "up": model.ups[0], "down": model.downs[0]}
    leaves = {f"{m}.{n}": p for m, module in modules.items() for n, p in module.named_parameters()}
    result = compare(step, leaves, inputs(), chunked(7, 23, lower))
    result.check()
    assert result.loops > 2, result.describe()


def test_attention_that_is_read_behind_a_detach_only() -> None:
    """A second pass gives targets; no backward is asked of its attention."""
    model = Tiny(classes=CLASSES)

    def logits(x: Tensor) -> Tensor:
        q = model.norms[0](x)[:, None]
        return model.head(x + F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0])  # type: ignore[no-any-return]

    def step(x: Tensor, labels: Tensor) -> Tensor:
        first, second = logits(x), logits(x * 1.01)
        return flat(first, labels) + F.mse_loss(first.softmax(-1), second.softmax(-1).detach())

    x, labels = inputs()
    leaves = {"head": model.head.weight, "norm": model.norms[0].weight, "x": x.requires_grad_()}
    result = compare(step, leaves, (x, labels), chunked(7, 5, "aot_eager"))
    result.check()
    assert result.loops, result.describe()


def is_made(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)


def test_logits_that_are_returned_too() -> None:
    """A graph's outputs are a promise: the logits stay, and their own gradient counts."""
    model = Tiny(classes=CLASSES)

    def both(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return flat(logits, labels), logits

    compiled = torch.compile(both, backend="mstc", options=chunked(7, 5, "eager"))

    def total(fn: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor], Tensor]:
        def step(x: Tensor, labels: Tensor) -> Tensor:
            loss, logits = fn(x, labels)
            return loss + logits.square().mean()

        return step

    leaves = dict(model.named_parameters())
    expected_loss, expected = gradients_of(total(both), leaves, inputs())
    loss, got = gradients_of(total(compiled), leaves, inputs())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert max(gradient_errors(got, expected).values()) <= 1e-9


def test_predictions_beside_the_loss() -> None:
    model = Tiny(classes=CLASSES)

    def both(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return flat(logits, labels), logits.argmax(-1)

    compiled = torch.compile(both, backend="mstc", options=chunked(7, 5, "eager"))
    expected, got = both(*inputs()), compiled(*inputs())
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=0)
    assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_chunk_whose_labels_are_all_ignored(reduction: str) -> None:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return flat(logits, labels.masked_fill(torch.arange(labels.shape[1]) < 12, -100), reduction=reduction)

    run(loss).check()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_whose_labels_are_all_ignored(reduction: str) -> None:
    """As eager: nan for a mean over nothing, 0 for a sum; and the gradients are the same."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return flat(logits, torch.full_like(labels, -100), reduction=reduction)

    run(loss).check()
