"""`verify` finds the pass that changes a result or a gradient, and no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.fx as fx

import mstc
from mstc import pipeline
from mstc.graph.editor import Editor
from mstc.passes.base import Context, Pass
from mstc.report import Fidelity
from testkit.exactness import chunked
from testkit.tiny import Tiny, inputs, step

aten = torch.ops.aten
Change = Callable[[Editor, fx.Node], fx.Node]


def other_values(editor: Editor, node: fx.Node) -> fx.Node:
    return editor.call(aten.tanh.default, node.args, like=node)


def other_gradients(editor: Editor, node: fx.Node) -> fx.Node:
    """The same values, cut off from what they are made of."""
    return editor.call(aten.detach.default, (editor.call(aten.gelu.default, node.args, like=node),), like=node)


def the_same(editor: Editor, node: fx.Node) -> fx.Node:
    return editor.call(aten.gelu.default, node.args, like=node)


def a_pass(name: str, change: Change) -> Pass:
    """Puts something else in the place of the first GELU."""

    def find(gm: fx.GraphModule, ctx: Context) -> Iterator[fx.Node]:
        yield gm.graph.find_nodes(op="call_function", target=aten.gelu.default)[0]

    def apply(editor: Editor, site: fx.Node, ctx: Context) -> None:
        editor.replace(site, change(editor, site), "changed")

    return Pass(name, "", Fidelity.EXACT, find, apply)


def run(monkeypatch: pytest.MonkeyPatch, *extra: Pass, verify: bool = True) -> Any:
    monkeypatch.setattr(pipeline, "PASSES", (*extra, *pipeline.PASSES))
    torch._dynamo.reset()
    return torch.compile(step(Tiny()), backend="mstc", options=chunked(7, 5, "eager", verify=verify))(*inputs())


def test_what_is_right_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step(Tiny())(*inputs())
    torch.testing.assert_close(run(monkeypatch, a_pass("harmless", the_same)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("change", "what"), [(other_values, "output 0"), (other_gradients, "gradient")])
def test_the_wrong_pass_is_named(monkeypatch: pytest.MonkeyPatch, change: Change, what: str) -> None:
    with pytest.raises(mstc.VerificationError, match=f"pass wrong changed {what}.*relative error"):
        run(monkeypatch, a_pass("harmless", the_same), a_pass("wrong", change), a_pass("late", other_values))


def test_nothing_is_compared_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not torch.equal(run(monkeypatch, a_pass("wrong", other_values), verify=False), step(Tiny())(*inputs()))
