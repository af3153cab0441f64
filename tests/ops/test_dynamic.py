"""Dynamic lengths: one graph and one symbolic body for all of them, exact at each, whatever the tail."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import mstc
from mstc import compat
from mstc.ops import program as programs
from mstc.ops.build import _inputs_of
from mstc.ops.joint import Backward
from testkit.exactness import chunked, gradient_errors, gradients_of
from testkit.float64 import true_float64
from testkit.hf_models import causal, tokens
from testkit.shares import first_of
from testkit.tiny import Tiny, inputs, step


def compiled(fn: Callable[..., Any], lower: str = "eager", dynamic: bool | None = None) -> Any:
    torch._dynamo.reset()
    counters.clear()
    mstc.clear_reports()
    return torch.compile(fn, backend="mstc", dynamic=dynamic, options=chunked(7, 5, lower))


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def agrees(fn: Any, fast: Any, model: nn.Module, args: tuple[Any, ...], bound: float = 1e-9) -> None:
    leaves = dict(model.named_parameters())
    loss, expected = gradients_of(fn, leaves, args)
    found, got = gradients_of(fast, leaves, args)
    assert abs(found.item() - loss.item()) <= bound * max(abs(loss.item()), 1)
    errors = gradient_errors(got, expected)
    assert max(errors.values()) <= bound, errors


@pytest.mark.parametrize("lower", first_of(["eager", "aot_eager", "inductor"], ["eager", "inductor"]))
def test_the_second_length_compiles_once_more_and_then_none_does(lower: str) -> None:
    """Among the lengths: one chunk, a tail of one token, a length that 2, 7 and 5 divide."""
    model = Tiny()
    fn = step(model)
    fast = compiled(fn, lower)
    for length in (23, 14, 36, 70, 5, 2, 41, 23):
        agrees(fn, fast, model, inputs(2, length))
    assert graphs() == 2
    dynamic = mstc.reports()[-1]
    assert {r.label for r in dynamic.regions if r.loop} == {r.label for r in mstc.reports()[0].regions if r.loop}


@pytest.mark.parametrize("amounts", [(3, 2), (-1, -2), (-1, 2)])
def test_padding_of_features_at_any_length(amounts: tuple[int, int]) -> None:
    """Padding by less than nothing, which is the derivative of padding too, takes numbers for lengths in C++."""
    torch.manual_seed(0)
    up, down = nn.Linear(8, 16).double(), nn.Linear(8 + sum(amounts), 8).double()

    def loss(x: Tensor) -> Tensor:
        return down(F.pad(F.gelu(up(x))[..., :8], amounts)).square().sum()

    step = torch.compile(loss, backend="mstc", options=chunked(7, 5), dynamic=True)
    for length in (23, 31):
        x = torch.randn(2, length, 8, dtype=torch.float64)
        got = torch.autograd.grad(step(x), [*up.parameters(), *down.parameters()])
        torch.testing.assert_close(got, torch.autograd.grad(loss(x), [*up.parameters(), *down.parameters()]))


def whole_patches(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[1] % 4)).unflatten(1, (-1, 4)).flatten(2)


def patches_that_fit(x: Tensor) -> Tensor:
    return x[:, : x.shape[1] - x.shape[1] % 4].unflatten(1, (-1, 4)).flatten(2)


def window(x: Tensor) -> Tensor:
    return x[:, : min(x.shape[1], 45)].repeat(1, 1, 4)


def at_least_45(x: Tensor) -> Tensor:
    return F.pad(x, (0, 12, 0, max(45 - x.shape[1], 0)))


def three_quarters(x: Tensor) -> Tensor:
    return x[:, : int(0.75 * x.shape[1])].repeat(1, 1, 4)


def half_by_interpolation(x: Tensor) -> Tensor:
    return F.interpolate(x.mT, scale_factor=0.5).mT.repeat(1, 1, 4)


def in_sevens(x: Tensor) -> Tensor:
    return F.pad(x, (0, 12, 0, 7 * math.ceil(x.shape[1] / 7) - x.shape[1]))


def a_third(x: Tensor) -> Tensor:
    return x[:, round(x.shape[1] / 3) :].repeat(1, 1, 4)


def half(x: Tensor) -> Tensor:
    return x[:, : math.floor(0.5 * x.shape[1])].repeat(1, 1, 4)


@pytest.mark.parametrize(
    "patches",
    [
        whole_patches,
        patches_that_fit,
        window,
        at_least_45,
        three_quarters,
        half_by_interpolation,
        in_sevens,
        a_third,
        half,
    ],
)
def test_patches_at_any_length(patches: Callable[[Tensor], Tensor]) -> None:
    """How many there are is a quotient of a remainder, one of two lengths, or a rounded share of one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 5)).double()

    def loss(x: Tensor) -> Tensor:
        return model(patches(x)).logsumexp(-1).sum()

    fast = compiled(loss, dynamic=True)
    for length in (41, 44, 47, 64):
        agrees(loss, fast, model, (torch.randn(2, length, 4, dtype=torch.float64),))
    assert graphs() <= 2  # nothing to cut off is a graph of its own, with any backend
    for report in mstc.reports():
        assert any(r.loop for r in report.regions), report.refusals


def test_writing_to_a_stretch_at_any_length() -> None:
    """As sequence-to-sequence models shift their labels."""
    torch.manual_seed(0)
    table, head = nn.Embedding(11, 8).double(), nn.Linear(8, 11).double()

    def loss(labels: Tensor) -> Tensor:
        shifted = labels.new_zeros(labels.shape)
        shifted[:, 1:] = labels[:, :-1].clone()
        shifted[:, 0] = 1
        return F.cross_entropy(head(table(shifted).cumsum(1)).flatten(0, 1), labels.flatten())

    step = torch.compile(loss, backend="mstc", options=chunked(7, 5), dynamic=True)
    leaves = [table.weight, *head.parameters()]
    for length in (23, 31):
        labels = torch.randint(0, 11, (2, length))
        got = torch.autograd.grad(step(labels), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(loss(labels), leaves))


def test_an_unused_output_of_any_length() -> None:
    model = Tiny()

    def loss(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(x)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

    step = torch.compile(loss, backend="mstc", options=chunked(7, 5, unused_outputs=(1,)), dynamic=True)
    for length in (23, 31):
        x, labels = inputs(2, length)
        value, logits = step(x, labels)
        torch.testing.assert_close(value, loss(x, labels)[0])
        assert logits.shape == (2, length, 11) and logits.isnan().all()


def test_batch_and_length_both_vary() -> None:
    model = Tiny()
    fn = step(model)
    fast = compiled(fn, "aot_eager")
    for batch, length in ((2, 23), (3, 14), (5, 9), (2, 23), (4, 50)):
        agrees(fn, fast, model, inputs(batch, length))
    assert graphs() == 2
    assert any(r.loop for r in mstc.reports()[-1].regions)


def test_mark_dynamic_compiles_once() -> None:
    model = Tiny()
    fn = step(model)
    fast = compiled(fn, "aot_eager")
    for length in (23, 14, 70):
        x, labels = inputs(2, length)
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(labels, 1)
        agrees(fn, fast, model, (x, labels))
    assert graphs() == 1
    assert any(r.loop for r in mstc.reports()[-1].regions)


@pytest.mark.parametrize(
    "kind", ["llama", pytest.param("gemma2", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_five_lengths_two_batch_sizes_train_and_eval(kind: str) -> None:
    """At most three graphs per grad mode, and nothing compiles afterwards."""
    model = causal(kind).eval()  # without dropout, whose numbers differ from eager's

    def fn(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]

    fast = compiled(fn, "aot_eager")
    cases = [(b, s) for s in (23, 50, 64, 31, 77) for b in (2, 3)]
    with true_float64():
        for b, s in cases:
            agrees(fn, fast, model, (tokens(b, s),))
            with torch.no_grad():
                assert abs(fast(tokens(b, s)).item() - fn(tokens(b, s)).item()) <= 1e-8
        assert graphs() <= 6
        before = graphs()
        for b, s in cases:
            fast(tokens(b, s)).backward()
    assert graphs() == before
    assert any(r.loop for r in mstc.reports()[-1].regions)


class Dropping(nn.Module):
    """Dropouts inside and between its layers, and a loss whose logits are shifted."""

    def __init__(self) -> None:
        super().__init__()
        self.tiny = Tiny()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = nn.functional.dropout(self.tiny.features(nn.functional.dropout(x, 0.2)), 0.3)
        logits = self.tiny.head(x)
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("lower", first_of(["eager", "aot_eager", "inductor"], ["aot_eager", "inductor"]))
def test_dropout_and_shifted_logits_of_any_length(lower: str) -> None:
    """Eager's numbers where they are drawn as eager draws; through Inductor, the same loss again for the same seed."""
    model = Dropping()
    fast = compiled(model, lower)
    leaves = dict(model.named_parameters())

    def seeded(fn: Any) -> Any:
        return lambda *args: (torch.manual_seed(5), fn(*args))[1]

    for length in (23, 14, 36, 70, 5, 41):
        args = inputs(2, length)
        if lower == "inductor":
            loss, gradients = gradients_of(seeded(fast), leaves, args)
            again, others = gradients_of(seeded(fast), leaves, args)
            assert torch.equal(loss, again)
            assert max(gradient_errors(gradients, others).values()) < 1e-12
        else:
            agrees(seeded(model), seeded(fast), model, args)
    assert graphs() == 2
    report = mstc.reports()[-1]
    assert not [r for r in report.refusals if r.pass_name in ("select", "draws", "mini_sequence", "lm_head")]
    assert [e for e in report.edits if e.pass_name == "select"]
    assert [e for e in report.edits if e.pass_name == "draws"]
    labels = [r.label for r in report.regions if r.loop]
    assert any("loss" in label for label in labels), labels


def test_guards_of_a_symbolic_body() -> None:
    """What tracing decides by a length is asked again for every other: `FakeTensorMode` alone would forget it."""
    mode, (n,) = compat.symbolic_lengths({"n": 8})
    with mode:
        x = torch.empty(n, 3)
    assert bool(x.shape[0] % 2 == 0)  # as a body might
    assert compat.keeps_guards([n], [12])
    assert not compat.keeps_guards([n], [13])
    assert not compat.keeps_guards([n], [1])  # lengths of 0 and 1 are never what a symbol was traced for


def test_a_body_for_special_lengths_may_read_less() -> None:
    """It is called with what the body for all lengths reads, and takes its own inputs of that."""
    general = Backward((0, 2), (0, 1), (1,), (0, 1), {}, {}, (), (), (), ())
    assert _inputs_of(general, general) == [0, 1, 2, 3, 4, 5, 6]
    assert _inputs_of(replace(general, shared=(1,), grads=(1,)), general) == [0, 1, 3, 4, 6]
    with pytest.raises(AssertionError, match="other inputs"):
        _inputs_of(replace(general, tokens=(1,)), general)


def test_guards_of_lengths_decided_to_be_equal() -> None:
    """A symbol that a guard ties to a number or to another one is still asked for by its own name."""
    _, (n, m, k) = compat.symbolic_lengths({"n": 8, "m": 8, "k": 5})
    assert bool(n == m)
    assert bool(k == 5)
    assert compat.keeps_guards([n, m, k], [12, 12, 5])
    assert not compat.keeps_guards([n, m, k], [12, 13, 5])
    assert not compat.keeps_guards([n, m, k], [12, 12, 6])


def test_a_length_that_breaks_a_guard_gets_a_body_of_its_own() -> None:
    model = Tiny()
    fn = step(model)
    fast = compiled(fn, "aot_eager", dynamic=True)
    agrees(fn, fast, model, inputs(2, 23))
    special = []
    for p in programs._programs.values():
        assert p.dynamic is not None
        own = p.dynamic.special
        p.dynamic.holds = lambda lengths: lengths[-1] % 2 == 0
        p.dynamic.special = lambda lengths, own=own: special.append(lengths) or own(lengths)
        p.dynamic._known.clear()
    agrees(fn, fast, model, inputs(2, 30))
    assert special and all(lengths[-1] % 2 for lengths in special)


class Kept(nn.Module):
    """The last ``keep`` tokens, all for 0, padded to whole blocks: numbers that are no length of a tensor."""

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.model, self.keep, self.block = Tiny(), keep, 16

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        x = self.model(x[:, -self.keep :])
        y = torch.nn.functional.pad(x, (0, 0, 0, (self.block - x.shape[1] % self.block) % self.block))
        return (self.model.head.weight @ y.transpose(1, 2)).square().mean() + x.logsumexp(-1).mean()


@pytest.mark.parametrize("keep", [0, 3])
def test_numbers_that_are_no_lengths(keep: int) -> None:
    module = Kept(keep)
    module.model.head = nn.Linear(8, 8, dtype=torch.float64)
    fast = compiled(module, dynamic=True)
    for length in (23, 31):
        agrees(module, fast, module, inputs(9, length))
    assert any(r.loop for r in mstc.reports()[-1].regions)


@pytest.mark.parametrize("lower", ["aot_eager", "inductor"])
def test_lengths_that_data_decide(lower: str) -> None:
    """Masked language modelling: the head sees the masked tokens only, however many; none and one among them."""
    model = Tiny()

    def fn(x: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        hidden = model.features(x)[mask]
        return nn.functional.cross_entropy(model.head(hidden), labels[mask], reduction="sum")

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        fast = compiled(fn, lower)
        for masked in (20, 3, 0, 1, 46):
            x, labels = inputs(2, 23)
            mask = (torch.arange(46) < masked).view(2, 23)
            agrees(fn, fast, model, (x, labels.clamp(min=0), mask))
    assert graphs() == 1
    assert any("LM head" in r.label and r.loop for r in mstc.reports()[-1].regions)
