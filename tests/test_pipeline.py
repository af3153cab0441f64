"""What the driver holds passes to: ``strict``, and refusals that say where and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import mstc
from testkit.exactness import chunked
from testkit.tiny import Tiny, inputs, mean_loss, step


def called(fn: Callable[..., Any], *args: Any, **options: Any) -> mstc.Report:
    torch._dynamo.reset()
    mstc.clear_reports()
    torch.compile(fn, backend="mstc", options={"lower": "eager", **options})(*args)
    (report,) = mstc.reports()
    return report


def strict_error(fn: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(BackendCompilerFailed) as raised:
        called(fn, *args, strict=True, **options)
    assert isinstance(raised.value.inner_exception, mstc.StrictError)
    return str(raised.value.inner_exception)


def test_strict_without_a_tokenwise_region() -> None:
    message = strict_error(lambda x: x.cumsum(1), inputs()[0], mini_sequence=True)
    assert "options['mini_sequence'] was asked for, but it changed nothing" in message and "no candidate" in message


def test_strict_tells_where_and_why() -> None:
    message = strict_error(step(Tiny()), *inputs(), lm_head=True)
    assert "linear_4 at " in message and "tiny.py:" in message and "chunks would not pay" in message


def test_strict_about_a_graph_that_has_no_normal_form() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))

    assert "higher-order op cond" in strict_error(fn, inputs()[0], masks=True)


def test_strict_is_content_with_what_was_done_or_not_asked_for() -> None:
    asked = {"mini_sequence": {"chunk_tokens": 7}, "lm_head": {"chunk_tokens": 5}}
    assert called(step(Tiny()), *inputs(), strict=True, **asked).edits
    assert not called(lambda x: x.cumsum(1), inputs()[0], strict=True).edits
    assert not called(lambda x: x.cumsum(1), inputs()[0], strict=True, mini_sequence=False).edits


def padded(x: Tensor, padding: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=padding[:, None, None]).sum()


def scores_kept(x: Tensor) -> tuple[Tensor, Tensor]:
    weights = (x @ x.mT).softmax(-1)
    return weights @ x, weights


def read_whole(x: Tensor, labels: Tensor) -> Tensor:
    """Two slices of the logits that meet in one loss."""
    logits = MODEL(x)
    return mean_loss(logits[:, :-1] + logits[:, 1:], labels[:, 1:])


MODEL = Tiny()


class Mixer(nn.Module):
    """A weight for each pair of tokens: without a batch there is nothing to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.features = (nn.Linear(n, n, dtype=torch.float64) for n in (23, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = x[0] + self.tokens(x[0].mT).mT
        return (h + self.features(h)).square().sum()


REFUSED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "a short text": (step(Tiny()), inputs(), "chunks would not pay"),
    "padding": (padded, (inputs()[0], torch.ones(2, 23).bool()), "mask"),
    "weights that are returned": (scores_kept, (inputs()[0],), "scores or weights are also read by|would not pay"),
    "slices that meet": (read_whole, inputs(), "is read whole|would not pay"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_node_line_and_reason(name: str) -> None:
    fn, args, reason = REFUSED[name]
    refusals = called(fn, *args).refusals
    assert refusals
    for r in refusals:
        path, _, line = r.source.rpartition(":")
        assert r.node and path.endswith(".py") and line.isdigit() and r.reason, r
    assert any(part in r.reason for r in refusals for part in reason.split("|"))


def test_products_that_no_region_holds_are_refused() -> None:
    """Nothing is left to the lowering without a word."""
    report = called(Mixer(), inputs()[0], **chunked(7, 5, "eager"))
    assert not report.regions
    refused = [r for r in report.refusals if r.pass_name == "mini_sequence"]
    assert [r.reason for r in refused] == ["all its axes are features of some weight"] * 2
    assert all(r.node and "test_pipeline.py:" in r.source for r in refused)
