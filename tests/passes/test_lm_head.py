"""Every head and loss of `mstc.cli.heads.programs`: results and every gradient, in loops, whatever is asked of them.

Where others fail on one of them, `docs/coverage.md` says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import mstc
from mstc.cli.heads.programs import LEAVES, PROGRAMS, Inputs, make_inputs, scalar_of
from testkit.exactness import chunked, gradient_errors, gradients_of, loops_of, lowered_graphs, products_outside
from testkit.shares import first_of
from testkit.tiny import Tiny

# Programs whose gradients cannot all come with the forward: what is asked of them depends on more than one loss.
RECOMPUTING = {
    "none",  # per-token losses are returned, and what their gradients will be is not known
    "log_probs",
    "with_logits",
    "two_scalars",  # two losses are returned
    "dpo",  # the loss is no linear function of its sums
    "reward",
    "question_answering",
}
# One row per sequence: there are no tokens, and four rows are not worth a loop.
WITHOUT_TOKENS = {"contrastive", "pooled_classes"}
# The head runs once more on one token of each sequence, outside the loop.
FEW_TOKENS = {"with_last_logits"}
IN_FLOAT32 = {"upcast"}
# These divide by a count of labels of their own, which is 0 where none counts: no numbers, in eager as well.
DIVIDING = {"per_sequence", "written_out", "clipped_ratio", "z_loss"}
COUNTING = ["mean", "sum", "class_weights", "smoothing", "weights_smoothing", "two_heads", "distill_beside", "none"]


# One of each kind: a loss loop of one sum, of several, a loop of two losses, of tokens, of a nonlinear loss.
KINDS = ["mean", "z_loss", "per_sequence", "two_heads", "two_scalars", "none", "dpo", "with_logits"]


class Case:
    """A program behind a small trunk, eager and compiled."""

    def __init__(
        self, name: str, batch: int = 4, length: int = 23, trunk: bool = True, chunk: int = 5, lower: str = "eager"
    ) -> None:
        self.inputs = make_inputs(batch, length, 8, 11)
        self.model = Tiny(width=8, inner=24, classes=11)
        self.program, self.trunk = PROGRAMS[name].run, trunk
        self.leaves = {n: getattr(self.inputs, n) for n in LEAVES}
        if trunk:
            self.leaves |= {n: p for n, p in self.model.named_parameters() if not n.startswith("head")}
        torch._dynamo.reset()
        mstc.clear_reports()
        self.compiled = torch.compile(self.run, backend="mstc", fullgraph=True, options=chunked(7, chunk, lower))

    def run(self, inputs: Inputs) -> Tensor | tuple[Tensor, ...]:
        if self.trunk:
            inputs = dataclasses.replace(inputs, hidden=self.model.features(inputs.hidden))
        return self.program(inputs)

    def gradients(
        self, fn: Callable[..., Any], wrap: Callable[[Tensor], Tensor] = lambda loss: loss
    ) -> dict[str, Tensor | None]:
        return gradients_of(lambda: wrap(scalar_of(fn(self.inputs))), self.leaves, ())[1]

    def check(self, bound: float = 1e-9) -> None:
        expected, got = self.run(self.inputs), self.compiled(self.inputs)
        expected, got = (x if isinstance(x, tuple) else (x,) for x in (expected, got))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)
        check_gradients(self.gradients(self.compiled), self.gradients(self.run), bound)


def check_gradients(
    got: dict[str, Tensor | None], expected: dict[str, Tensor | None], bound: float = 1e-9, least: float = 0.0
) -> None:
    assert {n for n, g in got.items() if g is None} == {n for n, g in expected.items() if g is None}
    errors = gradient_errors(got, expected, least=least)
    assert max(errors.values()) <= bound, errors


@pytest.mark.parametrize("name", PROGRAMS)
def test_exact_and_in_loops(name: str) -> None:
    case = Case(name)
    with lowered_graphs() as graphs:
        case.check(1e-6 if name in IN_FLOAT32 else 1e-9)
    kinds = {str(n.target).split(".")[1] for n in loops_of(graphs[0])}
    assert ("loss_loop" in kinds) == (name not in RECOMPUTING | WITHOUT_TOKENS)
    left = products_outside(graphs[0])
    assert (not left) == (name not in WITHOUT_TOKENS | FEW_TOKENS), left


@pytest.mark.parametrize("name", first_of(PROGRAMS, KINDS))
def test_fewer_tokens_than_chunks(name: str) -> None:
    """Three tokens in up to four chunks, one of them with no counted label."""
    case = Case(name, batch=2, length=3, trunk=False, chunk=1)
    case.check(1e-6 if name in IN_FLOAT32 else 1e-9)


@pytest.mark.parametrize("incoming", [0.5, pytest.param(0.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", first_of(KINDS, KINDS[:4]))
def test_incoming_gradient(name: str, incoming: float) -> None:
    case = Case(name)
    got, expected = (case.gradients(fn, lambda loss: incoming * loss) for fn in (case.compiled, case.run))
    check_gradients(got, expected, least=1e-9)


@pytest.mark.parametrize("name", first_of(KINDS, ["mean", "z_loss", "two_scalars", "none"]))
def test_two_micro_batches(name: str) -> None:
    case = Case(name)
    other = dataclasses.replace(case.inputs, labels=case.inputs.labels.roll(5, 1))

    def both(fn: Callable[..., Any]) -> dict[str, Tensor | None]:
        for leaf in case.leaves.values():
            leaf.grad = None
        for batch in (case.inputs, other):
            (scalar_of(fn(batch)) / 2).backward()  # type: ignore[no-untyped-call]
        return {n: leaf.grad for n, leaf in case.leaves.items()}

    got = {n: g if g is None else g.clone() for n, g in both(case.compiled).items()}
    check_gradients(got, both(case.run))


@pytest.mark.parametrize("name", first_of(KINDS, ["z_loss", "none"]))
def test_retained_graph(name: str) -> None:
    case = Case(name)
    total = scalar_of(case.compiled(case.inputs))
    leaves = list(case.leaves.values())
    once, again = (torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True) for _ in range(2))
    assert any(a is not None for a in once)
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("hidden", "trunk"), ("weight", "second", "trunk")])
@pytest.mark.parametrize("name", first_of(["z_loss", "none", "mean", "two_heads"], ["z_loss", "none"]))
def test_frozen(name: str, frozen: Sequence[str]) -> None:
    case = Case(name)
    if "trunk" in frozen:
        case.model.requires_grad_(False)
    for leaf in frozen:
        if leaf != "trunk":
            case.leaves[leaf].requires_grad_(False)
    check_gradients(case.gradients(case.compiled), case.gradients(case.run))


@pytest.mark.parametrize("first", [12, pytest.param(23, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", first_of([n for n in PROGRAMS if n not in DIVIDING], COUNTING))
def test_ignored_labels(name: str, first: int) -> None:
    """The first chunks hold no counted label, or none does: then as eager, nan for a mean over nothing."""
    case = Case(name, batch=2, trunk=False)
    case.inputs.labels[:, :first] = -100
    expected, got = case.run(case.inputs), case.compiled(case.inputs)
    expected, got = (x if isinstance(x, tuple) else (x,) for x in (expected, got))
    bound = 1e-6 if name in IN_FLOAT32 else 1e-9
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound, equal_nan=True)
    check_gradients(case.gradients(case.compiled), case.gradients(case.run), bound, least=1e-9)


@pytest.mark.parametrize("name", first_of(KINDS, ["z_loss", "per_sequence", "dpo"]))
def test_aot_lowering(name: str) -> None:
    Case(name, lower="aot_eager").check()


@pytest.mark.inductor
@pytest.mark.parametrize("name", first_of(["z_loss", "per_sequence"], ["z_loss"]))
def test_inductor_lowering(name: str) -> None:
    Case(name, lower="inductor").check()


def test_a_factor_made_from_the_logits() -> None:
    """A loss scaled by what the loop itself makes: its seed is not known before the loop."""
    inputs = make_inputs(2, 23, 8, 11)

    def step(i: Inputs) -> Tensor:
        logits = torch.nn.functional.linear(i.hidden, i.weight)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), i.labels.flatten())
        return loss * (logits.detach().argmax(-1) == i.labels).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="mstc", options=chunked(7, 5, "eager"))
    leaves = {"hidden": inputs.hidden, "weight": inputs.weight}
    got, expected = (gradients_of(fn, leaves, (inputs,))[1] for fn in (compiled, step))
    check_gradients(got, expected)


def test_sums_that_are_split() -> None:
    """Sums per text whose halves are compared: they meet in no scalar by linear steps alone."""
    inputs = make_inputs(2, 23, 8, 11)

    def step(i: Inputs) -> Tensor:
        chosen, rejected = _logits(i).logsumexp(-1).sum(-1).chunk(2)
        return -F.logsigmoid(chosen - rejected).mean()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="mstc", options=chunked(7, 5, "eager"))
    leaves = {"hidden": inputs.hidden, "weight": inputs.weight}
    got, expected = (gradients_of(fn, leaves, (inputs,))[1] for fn in (compiled, step))
    check_gradients(got, expected)
    assert "lm_head" in {e.pass_name for e in mstc.reports()[-1].edits}


@pytest.mark.parametrize("factor", [0.0, -2.0])
def test_a_factor_given_as_a_tensor(factor: float) -> None:
    """Also zero: no gradient, and not nan."""
    inputs = make_inputs(2, 23, 8, 11)

    def step(i: Inputs, factor: Tensor) -> Tensor:
        logits = torch.nn.functional.linear(i.hidden, i.weight)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), i.labels.flatten()) * factor

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="mstc", options=chunked(7, 5, "eager"))
    leaves = {"hidden": inputs.hidden, "weight": inputs.weight}
    given = (inputs, torch.tensor(factor, dtype=torch.float64))
    got, expected = (gradients_of(fn, leaves, given)[1] for fn in (compiled, step))
    check_gradients(got, expected, least=1e-9)


@pytest.mark.parametrize("name", sorted(WITHOUT_TOKENS))
def test_many_texts(name: str) -> None:
    """A batch of pooled texts is cut too: the sums over their tokens end one loop and enter another."""
    case = Case(name, batch=12)
    case.check()
    assert "lm_head" in {e.pass_name for e in mstc.reports()[-1].edits}


def _targets(i: Inputs) -> Tensor:
    return F.one_hot(i.labels.clamp(min=0), i.bias.shape[0]).to(i.hidden.dtype)


def _logits(i: Inputs) -> Tensor:
    return F.linear(i.hidden, i.weight)


# Losses that PyTorch writes with other ops, or that few people use after a head.
OTHER_LOSSES: dict[str, Callable[[Inputs], Tensor]] = {
    "binary cross-entropy": lambda i: F.binary_cross_entropy(_logits(i).sigmoid(), _targets(i)),
    "soft margin": lambda i: F.soft_margin_loss(_logits(i), 2 * _targets(i) - 1),
    "multi margin": lambda i: F.multi_margin_loss(_logits(i).flatten(0, 1), i.labels.clamp(min=0).flatten()),
    "multi margin, sum": lambda i: F.multi_margin_loss(
        _logits(i).flatten(0, 1), i.labels.clamp(min=0).flatten(), p=2, weight=i.classes, reduction="sum"
    ),
    "multilabel soft margin": lambda i: F.multilabel_soft_margin_loss(
        _logits(i).flatten(0, 1), _targets(i).flatten(0, 1)
    ),
    "Poisson": lambda i: F.poisson_nll_loss(_logits(i), _targets(i)),
    "hinge": lambda i: F.hinge_embedding_loss(_logits(i), 2 * _targets(i) - 1),
    "ranking": lambda i: F.margin_ranking_loss(_logits(i), F.linear(i.hidden, i.second), 2 * _targets(i) - 1),
    "cosine": lambda i: 1 - F.cosine_similarity(_logits(i), F.linear(i.teacher, i.teacher_weight), dim=-1).mean(),
    "cosine embedding": lambda i: F.cosine_embedding_loss(
        _logits(i).flatten(0, 1), F.linear(i.teacher, i.teacher_weight).flatten(0, 1), i.old.flatten().sign()
    ),
    "triplet": lambda i: F.triplet_margin_loss(
        _logits(i), F.linear(i.teacher, i.teacher_weight), F.linear(i.hidden, i.second)
    ),
    "distance": lambda i: F.pairwise_distance(_logits(i), F.linear(i.teacher, i.teacher_weight)).sum(),
}


@pytest.mark.parametrize("name", OTHER_LOSSES)
def test_other_losses(name: str) -> None:
    case = Case("mean", trunk=False)
    case.program = OTHER_LOSSES[name]
    with lowered_graphs() as graphs:
        case.check()
    assert any("loss_loop" in str(loop.target) for gm in graphs for loop in loops_of(gm)), mstc.reports()[-1].refusals
    assert not products_outside(graphs[0])
