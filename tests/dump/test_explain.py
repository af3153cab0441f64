"""`mstc.explain` and the dump behind it: captured without compiling or running."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mstc
from mstc.compat import FakeTensorMode
from mstc.dump.model import Dump
from mstc.passes.order import PASSES
from testkit.dumps import OPTIONS
from testkit.homegrown import NanoGPT
from testkit.tiny import Tiny, inputs, mean_loss, step


def dump_of(report: mstc.Report) -> Dump:
    found: Any = report.drawing
    assert isinstance(found.dump, Dump)
    return found.dump


def test_explain_tells_what_a_compilation_would_do() -> None:
    model, (x, labels) = Tiny(), inputs()
    report = mstc.explain(step(model, mean_loss), x, labels, options=OPTIONS)
    torch._dynamo.reset()
    mstc.clear_reports()
    torch.compile(step(model, mean_loss), backend="mstc", options=OPTIONS)(x, labels)
    (compiled,) = mstc.reports()
    assert report.regions == compiled.regions and report.edits == compiled.edits
    assert report.refusals == compiled.refusals and report.fidelity == compiled.fidelity
    assert [e.pass_name for e in report.edits] == ["token_losses", "lm_head", "mini_sequence", "mini_sequence"]


def test_a_mask_in_a_buffer_is_read_as_a_compilation_reads_it() -> None:
    model, ids = NanoGPT(fused=False), torch.randint(0, 50, (2, 20))
    report = mstc.explain(model, ids, options=OPTIONS)
    torch._dynamo.reset()
    mstc.clear_reports()
    torch.compile(model, backend="mstc", options=OPTIONS)(ids)
    (compiled,) = mstc.reports()
    assert report.regions == compiled.regions and report.edits == compiled.edits
    assert [r.label for r in report.regions if r.kind == "mixer"] == ["attention (causal)"] * 2


def test_explaining_neither_runs_nor_spoils_what_runs_later() -> None:
    model, (x, labels) = Tiny(), inputs()
    calls: list[int] = []

    def loss_fn(x: Tensor, labels: Tensor) -> Tensor:
        return mean_loss(model(x), labels)

    model.register_buffer("count", torch.zeros(()))
    expected = loss_fn(x, labels)
    for _ in range(12):  # more often than Dynamo would recompile
        report = mstc.explain(loss_fn, x, labels, options=OPTIONS)
        calls.append(len(report.regions))
    assert set(calls) == {3}
    got = torch.compile(loss_fn, backend="mstc", options=OPTIONS)(x, labels)
    got.backward()
    assert torch.allclose(got, expected, rtol=1e-12)
    assert all(p.grad is not None for p in model.parameters())


def test_in_place_changes_do_not_happen() -> None:
    module = nn.BatchNorm1d(4).double()
    mstc.explain(module, torch.randn(8, 4, dtype=torch.float64), options={"lower": "eager"})
    assert module.running_mean is not None and not module.running_mean.count_nonzero()


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_tensors_that_hold_nothing(kind: str) -> None:
    with torch.device("meta") if kind == "meta" else FakeTensorMode():
        x, up, down = (torch.empty(*shape, requires_grad=True) for shape in ((2, 4096, 8), (8, 24), (24, 8)))
    report = mstc.explain(lambda: (torch.relu(x @ up) @ down).cumsum(1).sum(), options=OPTIONS)
    assert [r.chunks for r in report.regions if r.loop] == [683]


def test_a_graph_break_shows_all_graphs() -> None:
    model, (x, labels) = Tiny(), inputs()

    def broken(x: Tensor, labels: Tensor) -> Tensor:
        features = model.features(x)
        torch._dynamo.graph_break()
        return mean_loss(model.head(features), labels)

    report = mstc.explain(broken, x, labels, options=OPTIONS)
    first, second = dump_of(report).graphs
    assert first.broken and not second.broken
    assert first.training and second.training
    (refusal,) = [r for r in report.refusals if r.pass_name == "capture"]
    assert refusal.source.startswith(__file__) and "the graph ends here" in refusal.reason
    assert any(b.status == "loss" for b in second.blocks)


def test_a_function_without_tensors_gives_no_graph() -> None:
    report = mstc.explain(lambda: 3)
    assert dump_of(report).graphs == () and report.regions == []


def test_a_graph_that_is_left_as_it_came() -> None:
    def branches(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,)).exp()

    (graph,) = dump_of(mstc.explain(branches, torch.randn(4))).graphs
    (refusal,) = graph.refusals
    assert refusal.pass_name == "normal_form" and refusal.reason
    assert len(graph.stages) == 1 and "exp" in [n.op for n in graph.first]
    assert graph.before.peak == 0


def test_what_is_no_function_is_named() -> None:
    with pytest.raises(TypeError, match=r"mstc.explain needs a function or module and its arguments, got int"):
        mstc.explain(3)  # type: ignore[arg-type]


def test_errors_come_through() -> None:
    def raises(x: Tensor) -> Tensor:
        raise ValueError("no such thing")

    with pytest.raises(mstc.OptionError, match="did you mean 'masks'"):
        mstc.explain(raises, torch.ones(2), options={"mask": True})
    with pytest.raises(ValueError, match="no such thing"):
        mstc.explain(raises, torch.ones(2))
    with pytest.raises(mstc.StrictError, match="lm_head"):
        mstc.explain(lambda x: x.sum(), torch.ones(2), options={"strict": True, "lm_head": True})


def test_nodes_tell_the_users_line_and_module(tiny_dump: Dump) -> None:
    nodes = {n.name: n for n in tiny_dump.graphs[0].first}
    linear = next(n for n in nodes.values() if n.op == "aten.linear")
    assert linear.source.rsplit(":", 1)[0].endswith("tiny.py") and "self.downs[i](F.gelu(" in linear.code
    assert linear.module == "ups.0" and linear.grad and linear.value == "f64[2, 23, 24]"
    assert linear.flops == 2 * 2 * 23 * 8 * 24 and linear.nbytes == 2 * 23 * 24 * 8
    weight = next(n for n in nodes.values() if n.title == "ups.0.weight")
    assert (weight.kind, weight.op) == ("parameter", "parameter")


def test_stages_follow_the_passes(tiny_dump: Dump) -> None:
    (graph,) = tiny_dump.graphs
    names = [s.name for s in graph.stages]
    assert names == ["", *(p.name for p in PASSES if p.name != "memory_budget")]  # none was given
    before = graph.stages[names.index("token_losses")]
    kept = {id(n) for n in before.nodes} & {id(n) for n in graph.first}
    assert len(kept) > 10, "a node that a pass leaves alone is the same record"
    loops = [n for n in graph.last if n.op.startswith("mstc.")]
    assert [n.op for n in loops].count("mstc.loss_loop") == 1
    assert all("chunks" in n.args and "mstc_" not in n.args for n in loops)
