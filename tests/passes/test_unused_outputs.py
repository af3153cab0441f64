"""Outputs that nobody reads: by position or by name; what matches none or several is an error that lists the names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import mstc
from mstc.options import Options
from mstc.passes.base import Context
from mstc.passes.unused_outputs import UNUSED_OUTPUTS
from mstc.report import Fidelity
from testkit.capture import normal_module, randn
from testkit.exactness import chunked
from testkit.tiny import Tiny, inputs, mean_loss


def returning(*what: str) -> Any:
    model = Tiny()

    def run(x: Tensor, labels: Tensor) -> tuple[Any, ...]:
        logits = model(x)
        found = {"loss": mean_loss(logits, labels), "logits": logits, "best": logits.argmax(-1), "twice": 2 * logits}
        return tuple(found[w] for w in what)

    return run


def compiled(run: Any, *unused: object) -> Any:
    torch._dynamo.reset()
    mstc.clear_reports()
    return torch.compile(run, backend="mstc", options=chunked(7, 5, "eager", unused_outputs=unused))(*inputs())


def names(run: Any) -> list[str]:
    """The names of the output nodes, as an error lists them."""
    message = refused(run, "no such name")
    return [part.split(": ")[1] for part in message.split("outputs: ")[1].split(", ")]


def refused(run: Any, *unused: object) -> str:
    with pytest.raises(BackendCompilerFailed) as raised:
        compiled(run, *unused)
    assert isinstance(raised.value.inner_exception, mstc.OptionError)
    return str(raised.value.inner_exception)


@pytest.mark.parametrize("by", ["position", "name"])
def test_what_is_dropped_costs_nothing_and_is_loud(by: str) -> None:
    run = returning("loss", "logits", "twice")
    loss, logits, twice = compiled(run, *([1, 2] if by == "position" else names(run)[1:]))
    expected = run(*inputs())
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
    for dropped in (logits, twice):
        assert dropped.shape == expected[1].shape and bool(dropped.isnan().all())
        assert dropped.untyped_storage().nbytes() == 8
    (report,) = mstc.reports()
    assert report.fidelity is Fidelity.ROUNDING and sum(e.pass_name == "unused_outputs" for e in report.edits) == 2
    assert any(r.loop and "LM head" in r.label for r in report.regions)


def test_a_name_that_matches_none() -> None:
    message = refused(returning("loss", "logits"), "logit")
    assert "'logit' matches no output" in message and "0: " in message and "1: linear_4" in message


def test_a_name_that_matches_several() -> None:
    """Dynamo returns each value once; the normal form may find that two are one."""

    def fn(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        return y, y

    gm = normal_module(fn, randn(3))
    ctx = Context(Options(unused_outputs=("sin",)), training=True)
    with pytest.raises(mstc.OptionError, match="'sin' matches 2 outputs; outputs: 0: sin, 1: sin"):
        list(UNUSED_OUTPUTS.find(gm, ctx))


def test_a_position_that_is_none() -> None:
    assert "holds 2, but this graph has 2 outputs" in refused(returning("loss", "logits"), 2)


def test_an_output_that_cannot_hold_a_nan() -> None:
    assert "has dtype torch.int64, which cannot hold the nan" in refused(returning("loss", "best"), 1)
