"""Bad input: the behaviour of eager, or a clear error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mstc.cli.heads.programs import PROGRAMS, Inputs, make_inputs
from testkit.exactness import Gradients, chunked, gradients_of
from testkit.tiny import Tiny, inputs, mean_loss, step
from testkit.versions import BEFORE_2_13

BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


def compiled(fn: Any, lower: str = "eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(fn, backend="mstc", options=chunked(7, 5, lower))


def test_a_loss_that_is_no_scalar() -> None:
    model = Tiny()
    run = step(model, lambda logits, labels: F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"))
    for fn in (run, compiled(run)):
        with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
            fn(*inputs()).backward()


@pytest.mark.parametrize("lower", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.inductor)])
@pytest.mark.parametrize("label", [11, pytest.param(-3, marks=pytest.mark.slow)])
def test_targets_out_of_range(label: int, lower: str) -> None:
    """Eager raises IndexError; Inductor's own kernels, as without mstc, raise RuntimeError."""
    if BEFORE_2_13 and lower == "inductor" and label < 0:
        pytest.skip(f"in torch {torch.__version__} Inductor's kernels count negative targets from the end")
    x, labels = inputs()
    labels[1, 20] = label
    fn = step(Tiny(classes=11), mean_loss)
    with pytest.raises(IndexError, match="out of bounds"):
        fn(x, labels)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        compiled(fn, lower)(x, labels)


def bad_places(gradients: Gradients) -> dict[str, Tensor]:
    """Where each gradient is no number."""
    return {n: ~g.isfinite() for n, g in gradients.items() if g is not None}


def check_same_places(fn: Callable[..., Tensor], leaves: dict[str, Tensor], given: tuple[Any, ...], lower: str) -> None:
    """Results and gradients are no numbers at the same places, and equal elsewhere."""
    expected_loss, expected = gradients_of(fn, leaves, given)
    loss, got = gradients_of(compiled(fn, lower), leaves, given)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-9, equal_nan=True)
    where, found = bad_places(expected), bad_places(got)
    assert where.keys() == found.keys()
    wrong = {n: (int(where[n].sum()), int(found[n].sum())) for n in where if not torch.equal(where[n], found[n])}
    assert not wrong, f"no numbers (eager, mstc): {wrong}"
    for name in where:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("lower", ["eager", "aot_eager"])
@pytest.mark.parametrize("bad", BAD)
def test_bad_numbers_in_a_trunk(bad: str, lower: str) -> None:
    """One element of one token: earlier tokens and other sequences keep their numbers where eager keeps them."""
    model, (x, labels) = Tiny(), inputs(2, 23)
    with torch.no_grad():
        x[1, 9, 3] = BAD[bad]
    leaves = {**dict(model.named_parameters()), "x": x.requires_grad_()}
    check_same_places(step(model), leaves, (x, labels), lower)


def test_bad_numbers_that_do_not_reach_the_loss() -> None:
    """Only tokens before the bad one are read. In the product of the head eager multiplies the bad one by zero,
    which is nan; here the head runs on the tokens that are read and stays clean. Nothing is bad that eager has not.
    """
    model, (x, labels) = Tiny(), inputs(2, 23)
    with torch.no_grad():
        x[1, 20, 3] = float("nan")
    leaves = {**dict(model.named_parameters()), "x": x.requires_grad_()}
    fn = step(model, lambda logits, labels: mean_loss(logits[:, :12], labels[:, :12]))
    expected_loss, expected = gradients_of(fn, leaves, (x, labels))
    loss, got = gradients_of(compiled(fn, "eager"), leaves, (x, labels))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-9)
    where, found = bad_places(expected), bad_places(got)
    assert where["head.weight"].any() and not found["head.weight"].any()
    for name in where:
        assert not (found[name] & ~where[name]).any(), name
        fine = ~where[name]
        torch.testing.assert_close(got[name][fine], expected[name][fine], rtol=1e-8, atol=1e-8)


HEADS = [
    "mean",
    "sum",
    "z_loss",
    "smoothing",
    "class_weights",
    "softcap",
    "per_sequence",
    "focal",
    "distill",
    "multi_label",
]


@pytest.mark.parametrize("token", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("bad", ["nan", *(pytest.param(b, marks=pytest.mark.slow) for b in BAD if b != "nan")])
@pytest.mark.parametrize("name", HEADS)
def test_bad_numbers_in_a_head(name: str, bad: str, token: int) -> None:
    """At a token whose label is ignored, and at one whose label counts."""
    made = make_inputs(2, 23, 8, 11)
    with torch.no_grad():
        made.hidden[1, token, 3] = BAD[bad]
    assert bool(made.labels[1, token] == -100) == (token == 1)

    def fn(hidden: Tensor, weight: Tensor) -> Tensor:
        result = PROGRAMS[name].run(dataclasses.replace(made, hidden=hidden, weight=weight))
        assert isinstance(result, Tensor)
        return result

    leaves = {"hidden": made.hidden, "weight": made.weight}
    check_same_places(fn, leaves, (made.hidden, made.weight), "eager")


def test_a_bad_weight_row() -> None:
    """One class whose weight is nan: all logits of that class."""
    made = make_inputs(2, 23, 8, 11)
    with torch.no_grad():
        made.weight[4] = float("nan")

    def fn(i: Inputs) -> Tensor:
        result = PROGRAMS["mean"].run(i)
        assert isinstance(result, Tensor)
        return result

    check_same_places(fn, {"hidden": made.hidden, "weight": made.weight}, (made,), "eager")
