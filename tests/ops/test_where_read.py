"""Wide values computed where they are read: the same numbers, one reader each, and no more memory than the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor
from torch.nn import functional as F

from mstc import compat
from mstc.graph.live import peak_bytes
from mstc.ops.where_read import LONGEST_CHAIN, MOST_COPIES, compute_where_read
from testkit.allocator import measured_peak
from testkit.shares import every

aten = torch.ops.aten
ROWS, WIDTH, CLASSES = 6, 4, 64
SCORES = 8 * ROWS * CLASSES  # bytes of all classes in float64


def entropy(s: Tensor) -> Tensor:
    log_p = s.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def focal(log_p: Tensor) -> Tensor:
    return -((1 - log_p.exp()) ** 2) * log_p


def divergence(s: Tensor, t: Tensor) -> Tensor:
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def jensen_shannon(s: Tensor, t: Tensor) -> Tensor:
    log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)
    middle = torch.logaddexp(log_p, log_q)
    return (log_p.exp() * (log_p - middle) + log_q.exp() * (log_q - middle)).sum(-1)


# By name: a loss of the scores and a teacher's, and how many values as large as the scores it needs at once.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "entropy": (lambda s, t: entropy(s).sum(), 1),
    "entropy by softmax": (lambda s, t: (s.logsumexp(-1) - (s.softmax(-1) * s).sum(-1)).sum(), 1),
    "softcap and squared probabilities": (lambda s, t: (30 * (s / 30).tanh()).softmax(-1).square().sum(), 1),
    "sigmoids": (lambda s, t: (F.softplus(s) - s.sigmoid() * s).sum(), 1),
    "reverse divergence": (lambda s, t: divergence(s, t).sum(), 2),
    "with temperature": (lambda s, t: divergence(s / 2, t / 2).sum(), 2),
    "Jensen-Shannon": (lambda s, t: jensen_shannon(s, t).sum(), 2),
}


def joint(loss: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Loss, and gradients of the hidden states and of the scores, as a loop's body computes them."""

    def run(hidden: Tensor, teacher: Tensor, weight: Tensor, gradient: Tensor) -> list[Tensor]:
        s, t = hidden @ weight.t(), teacher @ weight.t()
        with torch.enable_grad():
            x = s.detach().requires_grad_()
            value = loss(x, t)
            (dx,) = torch.autograd.grad(value, x, gradient)
        return [dx @ weight, dx, value.detach()]

    return run


def inputs() -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = [(ROWS, WIDTH), (ROWS, WIDTH), (CLASSES, WIDTH), ()]
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def traced(run: Any, given: list[Tensor]) -> tuple[fx.GraphModule, fx.GraphModule]:
    mode = compat.FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [mode.from_tensor(x) for x in given]
    with compat.isolated_tracing(mode), torch.no_grad():
        gm = compat.trace_flat(run, fakes)
        return gm, compute_where_read(gm, fakes)


@pytest.mark.parametrize(("loss", "held"), LOSSES.values(), ids=LOSSES)
def test_same_numbers_in_the_memory_of_the_scores(loss: Callable[[Tensor, Tensor], Tensor], held: int) -> None:
    run, given = joint(loss), inputs()
    _, new = traced(run, given)
    for found, expected in zip(new(*given), run(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    small = 8 * ROWS * (WIDTH + 16)  # a column each for maxima, sums and their like
    assert peak_bytes(new, fused=True) <= held * SCORES + small


@pytest.mark.parametrize(("loss", "held"), LOSSES.values(), ids=LOSSES)
def test_dear_values_of_all_classes_have_one_reader(loss: Callable[[Tensor, Tensor], Tensor], held: int) -> None:
    _, new = traced(joint(loss), inputs())
    dear = (aten.exp.default, aten.log1p.default, aten.tanh.default, aten.sigmoid.default)
    wide = [n for n in new.graph.nodes if n.target in dear and n.meta["val"].numel() == ROWS * CLASSES]
    assert wide and all(len(n.users) == 1 for n in wide)


def test_a_body_that_does_not_widen_its_tokens_is_left_alone() -> None:
    def mlp(x: Tensor, up: Tensor, down: Tensor, gradient: Tensor) -> list[Tensor]:
        return [F.silu(x @ up.t()) @ down.t() * gradient]

    g = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=g) for shape in ((ROWS, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), ())]
    gm, new = traced(mlp, given)
    assert new is gm


def test_copies_do_not_multiply_without_end() -> None:
    def doubling(s: Tensor, t: Tensor) -> Tensor:
        for _ in range(LONGEST_CHAIN // 3):
            s = s.exp() + s.tanh()
        return s.sum()

    run, given = joint(doubling), inputs()
    gm, new = traced(run, given)
    assert len(new.graph.nodes) <= len(gm.graph.nodes) + MOST_COPIES + 64
    torch.testing.assert_close(new(*given), run(*given), equal_nan=True)


def head(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Any, Callable[[], None], int]:
    """A head with a loss as one compiled step, and the bytes that it must hold: gradients, and one chunk's scores."""
    tokens, width, classes, chunk = 1024, 16, 4096, 256
    torch.manual_seed(0)
    model = torch.nn.Linear(width, classes, bias=False)
    x = torch.randn(1, tokens, width, requires_grad=True)
    target = torch.randint(0, classes, (1, tokens))
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: loss(model(x), target), backend="mstc", options={"lm_head": {"chunk_tokens": chunk}}, dynamic=False
    )

    def step() -> None:
        x.grad = model.weight.grad = None
        run(x).backward()

    return model, step, 4 * (tokens * width + classes * width + chunk * classes)


IN_PLACE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda s, y: F.cross_entropy(s.flatten(0, 1), y.flatten()),
    "label smoothing": lambda s, y: F.cross_entropy(s.flatten(0, 1), y.flatten(), label_smoothing=0.1),
    "class weights and smoothing": lambda s, y: F.cross_entropy(
        s.flatten(0, 1), y.flatten(), weight=torch.linspace(0.5, 1.5, s.shape[-1]), label_smoothing=0.1
    ),
    "classes in dimension 1": lambda s, y: F.cross_entropy(s.transpose(1, 2), y),
    "entropy bonus": lambda s, y: F.cross_entropy(s.flatten(0, 1), y.flatten()) - 0.01 * entropy(s).mean(),
    "entropy by softmax": lambda s, y: (s.logsumexp(-1) - (s.softmax(-1) * s).sum(-1)).mean(),
    "every class a label": lambda s, y: F.binary_cross_entropy_with_logits(s, F.one_hot(y, s.shape[-1]).to(s.dtype)),
    "focal": lambda s, y: focal(s.log_softmax(-1).gather(-1, y.unsqueeze(-1))).mean(),
    "losses per token too": lambda s, y: F.cross_entropy(s.flatten(0, 1), y.flatten(), reduction="none").sum(),
}


@pytest.mark.parametrize("loss", every(3, IN_PLACE.values()), ids=IN_PLACE)
def test_the_gradient_is_written_over_the_scores(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    model, step, held = head(loss)
    step()
    peak = measured_peak(step, model) - 4 * model.weight.numel()
    print(f"peak {peak}, must be held {held}, ratio {peak / held:.2f}")
    assert peak <= 1.1 * held
