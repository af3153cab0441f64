"""The normal form: functional, under one grad mode, with source lines; what it cannot keep is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mstc.backend
from mstc.graph.checker import check
from mstc.graph.normal_form import NormalForm, NotNormalError, normalize
from mstc.graph.provenance import source_of
from testkit.exactness import chunked, compare
from testkit.versions import NEEDS_CHECKS

aten = torch.ops.aten
EAGER = {"lower": "eager"}


def captured(fn: Callable[..., Any], *args: Any) -> NormalForm:
    """The normal form of the one graph that Dynamo makes of a call."""
    forms: list[NormalForm] = []

    def spy(gm: fx.GraphModule, inputs: Any) -> NormalForm:
        forms.append(normalize(gm, inputs))
        return forms[-1]

    torch._dynamo.reset()
    with mock.patch.object(mstc.backend, "normalize", spy):
        torch.compile(fn, backend="mstc", options=EAGER, fullgraph=True)(*args)
    (form,) = forms
    return form


def refusals(fn: Callable[..., Any], *args: Any) -> list[str]:
    mstc.clear_reports()
    torch._dynamo.reset()
    torch.compile(fn, backend="mstc", options=EAGER)(*args)
    return [r.reason for report in mstc.reports() for r in report.refusals if r.pass_name == "normal_form"]


def targets(form: NormalForm) -> list[Any]:
    return [n.target for n in form.gm.graph.nodes if n.op == "call_function"]


def x_of(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_ops_made_of_others_are_written_out_where_no_rule_knows_them() -> None:
    form = captured(lambda x, y: F.cosine_similarity(x, y, dim=-1).sum(), x_of(3, 4), x_of(3, 4))
    found = targets(form)
    assert aten.cosine_similarity.default not in found
    assert aten.linalg_vector_norm.default in found, found


def test_a_recurrence_is_not_written_out_token_by_token() -> None:
    cell = nn.GRU(4, 4, batch_first=True).double()
    weights = list(cell.parameters())

    def fn(x: Tensor) -> Tensor:
        return torch.gru(x, x.new_zeros(1, 2, 4), weights, True, 1, 0.0, False, False, True)[0]

    assert aten.gru.input in targets(captured(fn, x_of(2, 9, 4)))


def test_large_ops_stay_whole() -> None:
    weight, labels = x_of(7, 4), torch.randint(0, 7, (6,))

    def fn(x: Tensor) -> Tensor:
        y = F.layer_norm(x, (4,))
        y = F.scaled_dot_product_attention(y, y, y)
        return F.cross_entropy(F.linear(y, weight).reshape(-1, 7), labels)

    found = targets(captured(fn, x_of(2, 3, 4)))
    whole = (aten.layer_norm, aten.scaled_dot_product_attention, aten.linear, aten.cross_entropy_loss)
    assert all(op.default in found for op in whole)


def test_writes_in_place_are_gone() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x * 2
        y.add_(1)
        y[:, 0] = 0.0
        return y.sum()

    form = captured(fn, x_of(3, 4))
    check(form.gm)
    assert not [t for t in targets(form) if t._schema.is_mutable]


@NEEDS_CHECKS
@pytest.mark.parametrize("op", [torch.linalg.inv, torch.linalg.cholesky, lambda a: torch.linalg.solve(a, a + 1)])
@pytest.mark.parametrize("lower", ["aot_eager", "inductor"])
def test_ops_that_check_their_success(op: Callable[[Tensor], Tensor], lower: str) -> None:
    """The check has an effect and no value; it stays, so that a singular matrix is an error as in eager."""

    def fn(x: Tensor) -> Tensor:
        return op(x @ x.T).square().sum()

    x = x_of(4, 5)
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend="mstc", options={"lower": lower})
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], torch.autograd.grad(fn(x), x)[0])
    with pytest.raises(RuntimeError, match=r"linalg\."):
        compiled(torch.zeros_like(x, requires_grad=True))


def no_diagonal(x: Tensor) -> Tensor:
    return (x.T @ x).fill_diagonal_(0.5).square().sum()


def strided(x: Tensor) -> Tensor:
    y = x * 2
    y.as_strided((2, 3), (12, 2), 1).mul_(3)
    return y.square().sum()


@pytest.mark.parametrize("fn", [no_diagonal, strided])
def test_writes_to_strided_views(fn: Callable[[Tensor], Tensor]) -> None:
    """PyTorch's own derivative of ``as_strided_scatter``, which they become, is wrong."""
    x = x_of(5, 6)
    torch._dynamo.reset()
    got = torch.autograd.grad(torch.compile(fn, backend="mstc", options={"lower": "aot_eager"})(x), x)[0]
    torch.testing.assert_close(got, torch.autograd.grad(fn(x), x)[0])


def test_a_write_to_a_strided_view_of_a_tensor_in_another_order_is_refused() -> None:
    def fn(x: Tensor) -> Tensor:
        y = x.T * 2
        y.as_strided((2,), (1,)).mul_(3)
        return y.square().sum()

    (reason,) = refusals(fn, x_of(5, 6))
    assert "strided view" in reason


def test_a_mutated_input_is_copied_back_at_the_end() -> None:
    def fn(buffer: Tensor, x: Tensor) -> Tensor:
        buffer.mul_(0.5)
        buffer.add_(x.detach())
        return (x * buffer).sum()

    x, eager, compiled = x_of(4), torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    fn(eager, x)
    form = captured(fn, compiled, x)
    assert torch.equal(eager, compiled)
    writes = [n for n in form.gm.graph.nodes if n.target is aten.copy_.default]
    assert len(writes) == 1 and writes[0].args[0].op == "placeholder"


def test_running_statistics_are_updated_as_in_eager() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(6, 4, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(models[1], backend="mstc", options=EAGER)
    torch.testing.assert_close(models[0](x), compiled(x))
    for a, b in zip(models[0].buffers(), models[1].buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_no_grad_is_written_as_detach() -> None:
    def fn(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().amax(-1, keepdim=True)
        return (x / scale).square().sum()

    x = x_of(3, 4)
    form = captured(fn, x)
    check(form.gm)
    assert aten.detach.default in targets(form)
    needs = {n.target: n.meta["needs_grad"] for n in form.gm.graph.nodes if n.op == "call_function"}
    assert not needs[aten.amax.default] and needs[aten.div.Tensor]
    torch._dynamo.reset()
    expected = torch.autograd.grad(fn(x), x)[0]
    got = torch.autograd.grad(torch.compile(fn, backend="mstc", options=EAGER)(x), x)[0]
    torch.testing.assert_close(got, expected)


def test_inference_is_told_from_training() -> None:
    fn = lambda x: (x * 2).sum()  # noqa: E731
    assert captured(fn, x_of(3)).training
    assert not captured(fn, x_of(3).detach()).training
    with torch.no_grad():
        assert not captured(fn, x_of(3)).training


def test_a_checkpointed_block_is_inlined_and_tagged() -> None:
    weight = x_of(4, 4)

    def fn(x: Tensor) -> Tensor:
        return checkpoint(lambda y: F.silu(F.linear(y, weight)), x, use_reentrant=False).sum()

    form = captured(fn, x_of(3, 4))
    check(form.gm)
    tagged = {n.target for n in form.gm.graph.nodes if "recompute" in n.meta}
    assert aten.linear.default in tagged and aten.silu.default in tagged and aten.sum.default not in tagged


def test_a_higher_order_op_is_refused() -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.cos(), (x,)).sum()

    found = refusals(fn, torch.randn(4))
    assert len(found) == 1 and "higher-order op cond" in found[0]


def test_an_average_that_needs_gradients_is_refused_by_its_name() -> None:
    model, average = nn.Linear(4, 4), nn.Linear(4, 4)

    def step(x: Tensor) -> Tensor:
        with torch.no_grad():
            average.weight.lerp_(model.weight, 0.1)
        return (model(x) - average(x)).square().mean()

    torch._dynamo.reset()
    mstc.clear_reports()
    torch.compile(step, backend="mstc", options=EAGER)(torch.randn(6, 4)).backward()
    (refusal,) = mstc.reports()[-1].refusals
    assert refusal.reason == "average.weight, which needs a gradient, is changed in place"
    assert "requires_grad_(False)" in refusal.remedy


def test_an_input_that_changes_its_shape_is_refused() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_method("t_", (x,)),))
    with pytest.raises(NotNormalError, match="shape or strides changed in place"):
        normalize(fx.GraphModule(nn.Module(), graph), [torch.randn(2, 3)])


def test_a_parameter_that_gets_other_memory_is_refused() -> None:
    """``module.to(device)`` inside the function: offloaded experts do that. The step runs as it came."""
    model = nn.Linear(4, 4).double()

    def step(x: Tensor) -> Tensor:
        model.weight.data = model.weight.data * 0.5
        return model.to("cpu")(x).square().mean()

    start = model.weight.detach().clone()

    def again(x: Tensor) -> Tensor:
        model.weight.data = start.clone()
        return step(x)

    result = compare(again, dict(model.named_parameters()), [torch.randn(6, 4, dtype=torch.float64)])
    result.check()
    assert any("memory of another" in r.reason and r.source for report in result.reports for r in report.refusals)


TYPED: dict[str, Callable[[Tensor], Tensor]] = {
    "values": lambda x: x * torch.Tensor([9.0]),
    "cast": lambda x: x * torch.Tensor([1, 2, 3, 4]).to(x),
    "indices": lambda x: x[..., torch.LongTensor([2, 0])],
    "sizes, filled": lambda x: x + torch.FloatTensor(1, 4).fill_(2.0),
}


@pytest.mark.parametrize("fn", TYPED.values(), ids=TYPED)
def test_tensors_made_by_their_type(fn: Callable[[Tensor], Tensor]) -> None:
    """``torch.Tensor`` and its kind, which old code calls inside of forward."""
    model = nn.Linear(4, 4).double()
    inputs = [torch.randn(2, 30, 4, dtype=torch.float64)]
    result = compare(lambda x: fn(model(x)).square().mean(), dict(model.named_parameters()), inputs, chunked(7, 5))
    result.check()
    assert result.loops


def test_source_lines_are_kept() -> None:
    weight = x_of(4, 4)

    def fn(x: Tensor) -> Tensor:
        y = F.linear(x, weight)  # this line
        return y.sum()

    form = captured(fn, x_of(3, 4))
    (linear,) = form.gm.graph.find_nodes(op="call_function", target=aten.linear.default)
    file, line = source_of(linear).rsplit(":", 1)
    assert file.endswith("test_normal_form.py")
    with open(__file__, encoding="utf-8") as f:
        assert "this line" in f.readlines()[int(line) - 1]


def test_dropout_that_drops_nothing_is_gone() -> None:
    def fn(x: Tensor) -> Tensor:
        return (F.dropout(x, 0.0, True) + F.dropout(x, 0.5, False)).sum()

    assert aten.dropout.default not in targets(captured(fn, x_of(3, 4)))
    assert aten.dropout.default in targets(captured(lambda x: F.dropout(x, 0.5, True).sum(), x_of(3, 4)))


@pytest.mark.parametrize(("p", "train"), [(0.5, True), (0.5, False), (0.0, True), (1.0, True)])
def test_what_dropout_returns_may_be_written(p: float, train: bool) -> None:
    """Where it drops nothing it returns its input, so that this changes too."""

    def fn(x: Tensor) -> Tensor:
        h = 2 * x
        y = F.dropout(h, p, train)
        y += 1
        return (h * y).sum()

    def result(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        x = x_of(3, 4)
        value = run(x)
        return value.detach(), torch.autograd.grad(value, x)[0]

    found = result(torch.compile(fn, backend="mstc", options={"lower": "eager"}))
    torch.testing.assert_close(found, result(fn))


def test_a_whole_training_step() -> None:
    """The optimizer's graph holds the parameters itself and writes to them: it stays as it is, the loss's does not."""
    torch._dynamo.reset()
    mstc.clear_reports()
    models = [nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(50, 8)

    def step_of(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

        def step() -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    options = {**EAGER, "lm_head": {"chunk_tokens": 9}}
    steps = step_of(models[0]), torch.compile(step_of(models[1]), backend="mstc", options=options)
    for step in (*steps, *steps):
        step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, p)
    assert any("changed in place" in r.reason for report in mstc.reports() for r in report.refusals)
    assert any(e.pass_name == "lm_head" for report in mstc.reports() for e in report.edits)
