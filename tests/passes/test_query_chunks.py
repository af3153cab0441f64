"""Attention as people write it out, by chunks of queries: loss and every gradient, and nothing of S x S is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.nn import functional as F

import mstc
from mstc.graph.written import find_written
from testkit.attention import (
    B,
    D,
    H,
    K,
    Q,
    attention_loops,
    distance,
    end,
    options,
    qkv,
    randn,
    refusals,
    wide,
    wide_values,
)
from testkit.capture import normal_graph
from testkit.exactness import compare, gradient_errors, gradients_of, lowered_graphs
from testkit.hf_models import causal as causal_model
from testkit.hf_models import tokens

LOWEST = torch.finfo(torch.float64).min
Loss = Callable[..., Tensor]


def causal() -> Tensor:
    return torch.tril(torch.ones(Q, Q)).view(1, 1, Q, Q)


# ------------------------------------------------------------------ the ways in which people write it


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return end(F.softmax(q @ k.transpose(-2, -1) / math.sqrt(D), dim=-1) @ v)


def nano_gpt(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(D))
    a = a.masked_fill(causal() == 0, float("-inf"))
    return end(F.softmax(a, dim=-1) @ v)


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.tanh(q @ k.mT / 5.0) * 5.0
    a = a + torch.triu(torch.full((Q, Q), float("-inf")), diagonal=1)
    return end(F.softmax(a, dim=-1, dtype=torch.float64) @ v)


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    a = q @ k.mT + slopes.view(1, H, 1, 1) * distance()
    return end(F.softmax(torch.where(distance() <= 0, a, LOWEST), -1) @ v)


def bloom(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    bias = (slopes.view(H, 1, 1) * torch.arange(Q).view(1, 1, Q)).repeat(B, 1, 1)
    a = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, beta=1.0, alpha=D**-0.5).view(B, H, Q, Q)
    w = F.softmax(a + torch.zeros(Q, Q, dtype=q.dtype).masked_fill(distance() > 0, LOWEST), -1)
    return end(torch.bmm(w.view(B * H, Q, Q), v.flatten(0, 1)).view(B, H, Q, D))


def learned_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return end(F.softmax(q @ k.mT + bias, -1) @ v)


def bias_by_distance(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return end(F.softmax(q @ k.mT + table[distance() + Q - 1].permute(2, 0, 1), -1) @ v)


def t5(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Two layers share one bias."""
    far = 4 + (torch.log(distance().abs().clamp(min=1).double() / 4) * 2).long()
    bucket = torch.where(distance().abs() < 4, distance().abs(), far.clamp(max=7)) + (distance() > 0).long() * 8
    bias = F.embedding(bucket, table).permute(2, 0, 1).unsqueeze(0)
    x = F.softmax(q @ k.mT + bias, -1) @ v
    return end(F.softmax(x @ k.mT + bias, -1) @ v)


def sinks(q: Tensor, k: Tensor, v: Tensor, sink: Tensor) -> Tensor:
    a = q @ k.mT + torch.triu(torch.full((Q, Q), float("-inf")), diagonal=1)
    a = torch.cat([a, sink.reshape(1, -1, 1, 1).expand(B, -1, Q, -1)], dim=-1)
    a = a - a.max(dim=-1, keepdim=True).values
    return end(F.softmax(a, dim=-1)[..., :-1] @ v)


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values of 2 heads, broadcast to 4."""
    q, k, v = q.view(B, 2, 2, Q, D), k[:, :2].unsqueeze(2), v[:, :2].unsqueeze(2)
    a = torch.tanh(q @ k.mT).masked_fill(distance() > 0, float("-inf"))
    return end((F.softmax(a, -1) @ v).flatten(1, 2))


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x[:, :2, None].expand(B, 2, 2, Q, D).reshape(B, H, Q, D) for x in (k, v))
    return end(F.softmax(torch.tanh(q @ k.mT), -1) @ v)


def one_key_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Multi-query attention with heads and queries in one dimension of the product."""
    a = (q.reshape(B, H * Q, D) @ k[:, 0].mT).view(B, H, Q, Q)
    w = F.softmax(a.masked_fill(distance() > 0, LOWEST), -1)
    return end((w.view(B, H * Q, Q) @ v[:, 0]).view(B, H, Q, D))


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(D)
    y: Tensor = torch.einsum("bhij,bhjd->bihd", F.softmax(a, -1), v)
    return end(y.transpose(1, 2))


def padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first text has no key at all that counts: as eager, all keys alike."""
    real = torch.arange(Q)[None, :] < torch.tensor([[0], [30]])
    a = q @ k.mT + (1.0 - real[:, None, None, :].double()) * LOWEST
    return end(F.softmax(a, -1) @ v)


def hidden_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows without any key are nan in eager, and stay it."""
    real = torch.arange(Q)[None, :] < torch.tensor([[0], [30]])
    return end(F.softmax((q @ k.mT).masked_fill(~real[:, None, None, :], float("-inf")), -1) @ v)


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = (distance() <= 0) & (distance() > -8)
    return end(F.softmax(torch.tanh(q @ k.mT).masked_fill(~seen, float("-inf")), -1) @ v)


def cross(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return end(F.softmax(torch.tanh(q @ k.mT), -1) @ v)


def differential(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    first = F.softmax(q @ k.mT, -1)
    second = F.softmax(q.flip(1) @ k.flip(1).mT, -1)
    return end((first - mix * second) @ v)


def gathered(q: Tensor, k: Tensor, v: Tensor, near: Tensor) -> Tensor:
    """DeBERTa's way: scores against relative positions, gathered for each pair, content to position and back."""
    at = (distance() + 8).clamp(0, 15).expand(B, H, Q, Q)
    to = torch.gather(q @ near.mT, -1, at)
    back = torch.gather(k @ near.mT, -1, at).transpose(-1, -2)
    return end(F.softmax(q @ k.mT + to + back, -1) @ v)


@dataclass(frozen=True)
class Case:
    """loss; leaves: what gets gradients; loops: one for each product with values."""

    loss: Loss
    leaves: Callable[[], dict[str, Tensor]] = qkv
    more: dict[str, tuple[int, ...]] = field(default_factory=dict)
    loops: int = 1


CASES: dict[str, Case] = {
    "softcap": Case(softcap),
    "alibi": Case(alibi, more={"slopes": (H,)}),
    "bloom": Case(bloom, more={"slopes": (H,)}),
    "learned bias": Case(learned_bias, more={"bias": (1, H, Q, Q)}),
    "bias by distance": Case(bias_by_distance, more={"table": (2 * Q - 1, H)}),
    "t5": Case(t5, more={"table": (16, H)}, loops=2),
    "sinks": Case(sinks, more={"sink": (H,)}),
    "grouped heads": Case(grouped),
    "repeated heads": Case(repeated),
    "one key head": Case(one_key_head),
    "einsum": Case(einsum),
    "padding": Case(padding),
    "rows without keys": Case(hidden_rows),
    "window": Case(window),
    "cross attention": Case(cross, leaves=lambda: qkv(Q, K)),
    "differential": Case(differential, more={"mix": (1,)}),
}


def leaves_of(case: Case) -> dict[str, Tensor]:
    return {**case.leaves(), **{name: randn(*shape, seed=3) for name, shape in case.more.items()}}


@pytest.mark.parametrize("name", CASES)
def test_exact_and_nothing_of_all_pairs(name: str) -> None:
    case = CASES[name]
    leaves = leaves_of(case)
    result = compare(case.loss, leaves, list(leaves.values()), options())
    print(result.describe())
    result.check()
    assert attention_loops(result) == case.loops
    assert wide(result.graphs[0]) == []


def test_an_index_that_is_read_along_rows_and_columns_is_made_whole() -> None:
    """A piece of the queries would need it cut in two ways, so it stays outside; scores and weights do not."""
    leaves = {**qkv(), "near": randn(1, H, 16, D, seed=3)}
    result = compare(gathered, leaves, list(leaves.values()), options())
    print(result.describe())
    result.check()
    assert attention_loops(result) == 1
    left = [n for n in result.graphs[0].graph.nodes if n.name in {w.split()[0] for w in wide(result.graphs[0])}]
    assert left and not any(n.meta["val"].is_floating_point() for n in left)


@pytest.mark.parametrize("chunk", [1, 7, 36, 37])
def test_any_number_of_chunks(chunk: int) -> None:
    leaves = leaves_of(CASES["sinks"])
    result = compare(sinks, leaves, list(leaves.values()), options(chunk))
    result.check()
    assert attention_loops(result) == (chunk < Q)


@pytest.mark.parametrize("loss", [plain, nano_gpt])
def test_what_could_be_fused_runs_in_chunks_where_fusing_is_off(loss: Loss) -> None:
    result = compare(loss, leaves := qkv(), list(leaves.values()), options(written_attention=False))
    result.check()
    assert attention_loops(result) == 1


@pytest.mark.parametrize("name", ["t5", "sinks"])
def test_float32(name: str) -> None:
    case = CASES[name]
    leaves = {n: x.detach().float().requires_grad_() for n, x in leaves_of(case).items()}
    result = compare(case.loss, leaves, list(leaves.values()), options())
    result.check(torch.float32)
    assert attention_loops(result) == case.loops


@pytest.mark.parametrize("name", ["softcap", "t5"])
def test_inference(name: str) -> None:
    case = CASES[name]
    inputs = list(leaves_of(case).values())
    torch._dynamo.reset()
    mstc.clear_reports()
    with torch.no_grad():
        expected = case.loss(*inputs)
        found = torch.compile(case.loss, backend="mstc", options=options())(*inputs)
    assert abs(found - expected).item() < 1e-12
    assert sum("attention by queries" in e.what for e in mstc.reports()[-1].edits) == case.loops


def test_verify_holds_the_loop_to_the_graph_before_it() -> None:
    leaves = leaves_of(CASES["t5"])
    result = compare(t5, leaves, list(leaves.values()), options(verify=True))
    result.check()
    assert attention_loops(result) == 2


class Layer(nn.Module):
    """Softcapped attention between projections, with its residual stream."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.o = nn.Linear(H * D, 3 * H * D), nn.Linear(H * D, H * D)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.view(B, Q, H, D).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        a = torch.tanh(q @ k.mT).masked_fill(distance() > 0, float("-inf"))
        y = F.softmax(a, -1) @ v
        return x + self.o(y.transpose(1, 2).reshape(B, Q, H * D))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "lower", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.slow])]
)
def test_projections_around_it_run_in_loops_and_what_attention_reads_again_in_the_backward(lower: str) -> None:
    model = nn.Sequential(Layer(), Layer())

    def loss(x: Tensor) -> Tensor:
        return model(x).square().mean()  # type: ignore[no-any-return]

    result = compare(loss, dict(model.named_parameters()), [randn(B, Q, H * D)], options(lower=lower))
    print(result.describe())
    result.check()
    assert attention_loops(result) == 2
    assert any(e.pass_name == "recompute" for r in result.reports for e in r.edits)
    assert wide(result.graphs[0]) == []


# ------------------------------------------------------------------ dropout of the weights


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return end(F.dropout(F.softmax(q @ k.mT, -1), 0.3) @ v)


def nano_gpt_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(D))
    a = a.masked_fill(causal() == 0, float("-inf"))
    return end(F.dropout(F.softmax(a, dim=-1), 0.2) @ v)


def replayed(loss: Loss, loops: int, **more: Any) -> tuple[fx.GraphModule, mstc.Report]:
    """The same seed gives eager's loss, gradients and random state."""
    leaves = qkv()
    inputs = list(leaves.values())
    torch.manual_seed(5)
    expected, reference = gradients_of(loss, leaves, inputs)
    state = torch.get_rng_state()
    torch._dynamo.reset()
    mstc.clear_reports()
    torch.manual_seed(5)
    with lowered_graphs() as graphs:
        found, gradients = gradients_of(torch.compile(loss, backend="mstc", options=options(**more)), leaves, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert abs(found - expected).item() < 1e-12
    assert max(gradient_errors(gradients, reference).values()) < 1e-9
    report = mstc.reports()[-1]
    assert len([e for e in report.edits if e.pass_name == "query_chunks"]) == loops, report.refusals
    return graphs[0], report


@pytest.mark.parametrize("loss", [dropped, nano_gpt_dropped])
def test_dropout_of_the_weights_draws_the_numbers_of_eager(loss: Loss) -> None:
    gm, _ = replayed(loss, 1)
    assert {dtype for _, dtype in wide_values(gm)} == {torch.bool}  # the mask alone is drawn whole


def test_random_scores_are_drawn_outside() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = torch.tanh(q @ k.mT)
        return end(F.softmax(a + torch.rand_like(a), -1) @ v)

    gm, _ = replayed(loss, 1)
    assert all("rand_like" in shown or "empty" in shown for shown in wide(gm)), wide(gm)


def test_numbers_drawn_by_the_scores_are_refused_and_right() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = F.softmax(q @ k.mT, -1)
        return end((w * torch.bernoulli(w.detach().clamp(0, 1))) @ v)

    _, report = replayed(loss, 0)
    reasons = [x.reason for x in report.refusals if x.pass_name == "query_chunks"]
    assert any("also read by" in reason for reason in reasons), reasons


@pytest.mark.inductor
def test_dropout_of_the_weights_through_inductor_keeps_nothing_square() -> None:
    """Masks from seeds: the same for every size of chunks, another for another seed, and the gradient is the slope."""
    leaves = qkv()
    inputs = list(leaves.values())
    results = []
    for length in (7, 11):
        torch._dynamo.reset()
        compiled = torch.compile(nano_gpt_dropped, backend="mstc", options=options(length, lower="inductor"))
        torch.manual_seed(5)
        with lowered_graphs() as graphs:
            results.append(gradients_of(compiled, leaves, inputs))
        assert wide(graphs[0]) == []
    torch.manual_seed(6)
    results.append(gradients_of(compiled, leaves, inputs))
    (one, _), (same, _), (other, _) = results
    torch.testing.assert_close(one, same, rtol=1e-12, atol=0)
    assert not torch.equal(one, other)
    direction = {n: randn(*x.shape, seed=9).detach() for n, x in leaves.items()}
    values = []
    for sign in (1, -1):
        torch.manual_seed(6)
        values.append(compiled(*((x + sign * 1e-6 * direction[n]) for n, x in leaves.items())).item())
    slope = sum(float((g * direction[n]).sum()) for n, g in results[2][1].items() if g is not None)
    assert abs((values[0] - values[1]) / 2e-6 - slope) < 1e-5 * abs(slope)


# ------------------------------------------------------------------ what is left whole, and why


def test_weights_that_are_read_otherwise_stay() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        w = F.softmax(torch.tanh(q @ k.mT), -1)
        return end(w @ v) + w.square().mean()

    result = compare(loss, leaves := qkv(), list(leaves.values()), options())
    result.check()
    assert attention_loops(result) == 0
    assert "also read by" in refusals(result)[0]


def test_scores_that_are_read_otherwise_stay() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = torch.tanh(q @ k.mT)
        return end(F.softmax(a, -1) @ v) + a.square().mean()

    result = compare(loss, leaves := qkv(), list(leaves.values()), options())
    result.check()
    assert attention_loops(result) == 0
    assert "also read by" in refusals(result)[0]


def test_short_attention_stays_whole() -> None:
    result = compare(cross, leaves := qkv(), list(leaves.values()), {"lower": "aot_eager"})
    result.check()
    assert attention_loops(result) == 0
    assert "would not pay" in refusals(result)[0]


def test_a_dynamic_length_runs_in_chunks() -> None:
    torch._dynamo.reset()
    mstc.clear_reports()
    inputs = list(qkv().values())
    for x in inputs:
        torch._dynamo.mark_dynamic(x, 2)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (F.softmax(torch.tanh(q @ k.mT), -1) @ v).square().mean()

    found = torch.compile(loss, backend="mstc", options=options())(*inputs)
    assert abs(found - loss(*inputs)).item() < 1e-12
    (report,) = mstc.reports()
    assert [e.pass_name for e in report.edits if e.pass_name == "query_chunks"] == ["query_chunks"], report.refusals


def test_a_router_is_no_attention() -> None:
    def route(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
        return F.softmax(x @ weight.t(), -1) @ experts

    assert not list(find_written(normal_graph(route, randn(40, 8), randn(5, 8), randn(5, 8))))


def test_linear_attention_is_no_attention_by_scores() -> None:
    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.softmax(q, -1) @ (F.softmax(k, -2).mT @ v)

    assert not list(find_written(normal_graph(linear, *qkv().values())))


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_trunk_is_cut_along_its_tokens_beside_other_loops(kind: str) -> None:
    """The loops of a head and of written-out attention (gemma2) say nothing of the batch, though it is longer."""
    model, ids = causal_model(kind), tokens(9, 7)
    size = {"chunk_tokens": 3}
    given = {"lower": "eager", "lm_head": size, "mini_sequence": size, "query_chunks": size}
    report = mstc.explain(lambda: model(input_ids=ids, labels=ids).loss, options=given)
    assert len(report.regions) >= 5 and {r.tokens for r in report.regions} == {"7"}
