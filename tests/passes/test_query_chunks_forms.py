"""Attention without a softmax op, as papers and people write it: the same chunks, and nothing of S x S is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mstc
from testkit.allocator import measured_peak
from testkit.attention import B, D, H, Q, attention_loops, end, options, randn, refusals, wide
from testkit.exactness import compare, gradient_errors, gradients_of
from testkit.shares import first_of

Loss = Callable[..., Tensor]


def behind(x: Tensor) -> Tensor:
    """How many tokens the key stands behind the query."""
    at = torch.arange(x.shape[-2])
    return at[:, None] - at[None, :]


# ------------------------------------------------------------------ decays and gates


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """RetNet's parallel form, its normalizers with it."""
    gamma = 1 - 2.0 ** (-5 - torch.arange(q.shape[1], dtype=q.dtype))
    decay = torch.where(behind(q) >= 0, gamma[:, None, None] ** behind(q).clamp(min=0), 0.0)
    decay = decay / decay.sum(-1, keepdim=True).sqrt()
    a = q @ k.transpose(-1, -2) * decay
    return end((a / a.detach().abs().sum(-1, keepdim=True).clamp(min=1, max=5e4)) @ v)


def mlstm(q: Tensor, k: Tensor, v: Tensor, forget: Tensor, enter: Tensor) -> Tensor:
    """xLSTM's: the maximum stands in a row of the gates, which no query or key is in."""
    f = F.logsigmoid(forget).cumsum(-1)
    log = f[..., :, None] - f[..., None, :] + enter[..., None, :]
    log = torch.where(behind(q) >= 0, log, -math.inf)
    m, _ = log.max(-1, keepdim=True)
    c = q @ (k / math.sqrt(q.shape[-1])).mT * torch.exp(log - m)
    n = torch.maximum(c.sum(-1, keepdim=True).abs(), torch.exp(-m))
    return end((c / (n + 1e-6)) @ v)


def state_space(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Mamba-2's quadratic form; scores, decay and values meet in one product."""
    c = F.logsigmoid(gate).cumsum(-1)
    decay = torch.exp((c[..., :, None] - c[..., None, :]).masked_fill(behind(q) < 0, -math.inf))
    y: Tensor = torch.einsum("bhij,bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k), decay, v)
    return end(y)


def forgetting(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    c = F.logsigmoid(gate).cumsum(-1)
    a = q @ k.mT + c[..., :, None] - c[..., None, :]
    return end(F.softmax(a.masked_fill(behind(q) < 0, -math.inf), -1) @ v)


# ------------------------------------------------------------------ functions of one score


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return end(torch.sigmoid(q @ k.mT / math.sqrt(q.shape[-1]) - math.log(q.shape[-2])) @ v)


def squared_relu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A node that reads the same scores twice."""
    a = F.relu(torch.einsum("bhnd,bhmd->bhnm", q, k) / q.shape[-2])
    y: Tensor = torch.einsum("bhnm,bhmd->bhnd", a * a, v)
    return end(y)


def polynomial(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = ((1 + q @ k.mT) ** 3).tril()
    return end((a / (a.abs().sum(-1, keepdim=True) + 1e-6)) @ v)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return end(torch.tril(q @ k.transpose(-2, -1)) @ v)


def normalized_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two things read the weights at last: the product with the values and the sum over keys."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    a = (q @ k.mT) * torch.tril(torch.ones(q.shape[-2], q.shape[-2], dtype=q.dtype))
    return end((a @ v) / (a.sum(-1, keepdim=True) + 1e-6))


def gaussian(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    far = q.square().sum(-1)[..., :, None] + k.square().sum(-1)[..., None, :] - 2 * q @ k.mT
    return end(torch.exp(-far.clamp(min=0)) @ v)


def distances(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return end(F.softmax(-torch.cdist(q, k), -1) @ v)


def distances_of_another_norm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return end(torch.exp(-torch.cdist(q, k, p=1)) @ v)


def differences(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No product meets queries and keys; whole, their differences would be S x S x D."""
    return end(torch.exp(-(q[..., :, None, :] - k[..., None, :, :]).pow(2).sum(-1)) @ v)


def additive(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Bahdanau's; GATv2's."""
    return end(F.softmax(torch.tanh(q[..., :, None, :] + k[..., None, :, :]) @ w, -1) @ v)


def graph_attention(q: Tensor, k: Tensor, v: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """GAT's, over a dense graph."""
    e = F.leaky_relu((q @ left)[..., :, None] + (k @ right)[..., None, :], 0.2)
    return end(F.softmax(e.masked_fill(behind(q) < 0, -9e15), -1) @ v)


def all_in_one(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """Scores that are no node of their own."""
    c = F.logsigmoid(gate).cumsum(-1)
    decay = torch.exp((c[..., :, None] - c[..., None, :]).masked_fill(behind(q) < 0, -math.inf))
    y: Tensor = torch.einsum("bhid,bhjd,bhij,bhje->bhie", q, k, decay, v)
    return end(y)


def flat_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads and queries in one dimension of both products, one set of keys."""
    b, h, n, d = q.shape
    a = (q.reshape(b, h * n, d) @ k[:, 0].mT).view(b, h, n, n)
    w = torch.sigmoid(a.masked_fill(behind(q) < 0, -1e4))
    return end((w.view(b, h * n, n) @ v[:, 0]).view(b, h, n, d))


def multiplied_and_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The product with the values as a sum of products."""
    return end((torch.tanh(q @ k.mT)[..., None] * v[:, :, None]).sum(-2))


# ------------------------------------------------------------------ a row at a time


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT / math.sqrt(q.shape[-1])
    e = (s - s.max(dim=-1, keepdim=True).values).exp()
    return end((e / e.sum(-1, keepdim=True)) @ v)


def by_hand_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = torch.einsum("bhid,bhjd->bhij", q, k)
    e = torch.exp(s - s.amax(-1, keepdim=True).detach())
    return end((e @ v) / e.sum(-1)[..., None])


def off_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = q @ k.mT
    m = s.amax(-1, keepdim=True).clamp(min=0)
    e = torch.exp(s - m)
    return end((e / (torch.exp(-m) + e.sum(-1, keepdim=True))) @ v)


def sparsemax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z = q @ k.mT
    high, _ = torch.sort(z, dim=-1, descending=True)
    total = high.cumsum(-1)
    size = (1 + torch.arange(1, z.shape[-1] + 1) * high > total).sum(-1, keepdim=True)
    return end(torch.clamp(z - (total.gather(-1, size - 1) - 1) / size, min=0) @ v)


def stick_breaking(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    z, before = q @ k.mT, behind(q) > 0
    rest = F.logsigmoid(-z).masked_fill(~before, 0)
    w = torch.exp(F.logsigmoid(z) + rest.flip(-1).cumsum(-1).flip(-1) - rest).masked_fill(~before, 0)
    return end(w @ v + (1 - w.sum(-1))[..., None] * v)


def top_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = q @ k.mT
    return end(F.softmax(a.masked_fill(a < a.topk(5, -1).values[..., -1:], -math.inf), -1) @ v)


# ------------------------------------------------------------------ several products


def talking_heads(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    a = torch.einsum("bhij,hg->bgij", q @ k.mT, mix)
    return end(torch.einsum("bhij,hg->bgij", F.softmax(a, -1), mix) @ v)


def shaw(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Relative positions give keys and values of their own to each pair."""
    at = behind(q) + q.shape[-2] - 1
    w = F.softmax(q @ k.mT + torch.einsum("bhid,ijd->bhij", q, keys[at]), -1)
    return end(w @ v + torch.einsum("bhij,ijd->bhid", w, values[at]))


def shaw_by_matmul(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    b, h, n, d = q.shape
    at = behind(q) + n - 1
    near = torch.matmul(q.permute(2, 0, 1, 3).reshape(n, b * h, d), F.embedding(at, keys).mT)
    w = F.softmax(q @ k.mT + near.transpose(0, 1).reshape(b, h, n, n), -1)
    more = torch.matmul(w.permute(2, 0, 1, 3).reshape(n, b * h, n), F.embedding(at, values))
    return end(w @ v + more.transpose(0, 1).reshape(b, h, n, d))


def two_hops(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = torch.sigmoid(q @ k.mT)
    return end(w @ (w @ v).sin())


def both_ways(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries read keys, and keys queries."""
    s = q @ k.mT
    return end(F.softmax(s, -1) @ v) + end(F.softmax(s, -2).mT @ v.sin())


def bias_of_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """A fused attention that reads scores of others as its mask."""
    more = torch.tanh(q.flip(1) @ k.flip(1).mT) + bias
    return end(F.scaled_dot_product_attention(q, k, v, attn_mask=more))


def entropy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What a regularizer reads is a sum over keys."""
    p = F.softmax(torch.tanh(q @ k.mT), -1)
    return end(p @ v) - (p * torch.log(p + 1e-9)).sum(-1).mean()


def late_interaction(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd->bhij", q, k).max(-1).values.square().mean() + v.mean()


def contrastive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """InfoNCE over tokens, both ways."""
    a, b = (F.normalize(x.transpose(1, 2).flatten(2).flatten(0, 1), dim=-1) for x in (q, k))
    scores, right = a @ b.t() / 0.1, torch.arange(len(a))
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.t(), right)) / 2 + v.mean()


@dataclass(frozen=True)
class Form:
    """loss; more: other leaves, their shapes in S and H; loops: how many it becomes."""

    loss: Loss
    more: dict[str, str] = field(default_factory=dict)
    loops: int = 1


FORMS: dict[str, Form] = {
    "retention": Form(retention),
    "mLSTM": Form(mlstm, {"forget": "BHS", "enter": "BHS"}),
    "state space": Form(state_space, {"gate": "BHS"}),
    "forgetting": Form(forgetting, {"gate": "BHS"}),
    "sigmoid": Form(sigmoid),
    "squared relu": Form(squared_relu),
    "polynomial": Form(polynomial),
    "linear": Form(linear),
    "normalized after": Form(normalized_after),
    "gaussian": Form(gaussian),
    "distances": Form(distances),
    "distances of another norm": Form(distances_of_another_norm),
    "differences": Form(differences),
    "additive": Form(additive, {"w": "D"}),
    "graph attention": Form(graph_attention, {"left": "D", "right": "D"}),
    "all in one": Form(all_in_one, {"gate": "BHS"}),
    "flat heads": Form(flat_heads),
    "multiplied and summed": Form(multiplied_and_summed),
    "softmax by hand": Form(by_hand),
    "softmax by hand, divided after": Form(by_hand_after),
    "softmax off by one": Form(off_by_one),
    "sparsemax": Form(sparsemax),
    "stick breaking": Form(stick_breaking),
    "top keys": Form(top_keys),
    "talking heads": Form(talking_heads, {"mix": "HH"}),
    "Shaw": Form(shaw, {"keys": "2D", "values": "2D"}),
    "Shaw by matmul": Form(shaw_by_matmul, {"keys": "2D", "values": "2D"}),
    "two hops": Form(two_hops, loops=2),
    "both ways": Form(both_ways, loops=2),
    "bias of products": Form(bias_of_products, {"bias": "SS"}),
    "entropy": Form(entropy),
    "late interaction": Form(late_interaction),
    "contrastive": Form(contrastive, loops=2),
}


def leaves_of(form: Form, b: int, h: int, n: int, d: int) -> dict[str, Tensor]:
    sizes = {"B": b, "H": h, "S": n, "D": d, "2": 2 * n - 1}
    more = {name: randn(*(sizes[c] for c in shape), seed=3 + i) for i, (name, shape) in enumerate(form.more.items())}
    return {"q": randn(b, h, n, d), "k": randn(b, h, n, d, seed=1), "v": randn(b, h, n, d, seed=2), **more}


@pytest.mark.parametrize("name", FORMS)
def test_exact_and_nothing_of_all_pairs(name: str) -> None:
    form = FORMS[name]
    leaves = leaves_of(form, B, H, Q, D)
    result = compare(form.loss, leaves, list(leaves.values()), options())
    print(result.describe())
    result.check()
    assert attention_loops(result) == form.loops
    assert wide(result.graphs[0]) == []


@pytest.mark.parametrize("shape", [(1, 2, 9, 9), (2, 9, 9, 4), (3, 3, 8, 8)], ids=["S is D", "S is H", "B is H"])
@pytest.mark.parametrize("name", ["retention", "mLSTM", "normalized after", "softmax by hand", "Shaw", "flat heads"])
def test_equal_sizes_are_told_apart(name: str, shape: tuple[int, int, int, int]) -> None:
    form = FORMS[name]
    leaves = leaves_of(form, *shape)
    result = compare(form.loss, leaves, list(leaves.values()), options(4))
    print(result.describe())
    result.check()
    assert attention_loops(result) == form.loops


@pytest.mark.parametrize("chunk", [1, 7, 36])
def test_any_number_of_chunks(chunk: int) -> None:
    leaves = leaves_of(FORMS["normalized after"], B, H, Q, D)
    result = compare(normalized_after, leaves, list(leaves.values()), options(chunk))
    result.check()
    assert attention_loops(result) == 1


@pytest.mark.parametrize("name", first_of(["retention", "mLSTM"], ["retention"]))
@pytest.mark.inductor
def test_through_inductor(name: str) -> None:
    form = FORMS[name]
    leaves = leaves_of(form, B, H, Q, D)
    result = compare(form.loss, leaves, list(leaves.values()), options(lower="inductor"))
    result.check()
    assert attention_loops(result) == form.loops


def test_twice_the_length_takes_twice_the_memory() -> None:
    """Eager takes four times as much: its scores are S x S."""
    model = nn.Linear(16, 48)
    peaks = []
    for n in (512, 1024):
        x = torch.randn(1, n, 16)

        def loss(x: Tensor) -> Tensor:
            return normalized_after(*(y.view(1, -1, 2, 8).transpose(1, 2) for y in model(x).chunk(3, -1)))

        torch._dynamo.reset()
        compiled = torch.compile(loss, backend="mstc", options=options(32))
        compiled(x).backward()
        peaks.append(measured_peak(lambda: compiled(x).backward(), model))  # noqa: B023
    assert peaks[1] < 2.2 * peaks[0], peaks
    assert peaks[1] < 2 * 4 * 1024 * 1024, peaks  # the scores of both heads, once


def dynamic(loss: Loss, lengths: tuple[int, ...]) -> list[mstc.Report]:
    """Reports of one graph that serves all these lengths, its loss and gradients held to eager's."""
    torch._dynamo.reset()
    mstc.clear_reports()
    compiled = torch.compile(loss, backend="mstc", options=options())
    for n in lengths:
        leaves = leaves_of(Form(loss), B, H, n, D)
        for x in leaves.values():
            torch._dynamo.mark_dynamic(x, 2)
        found, gradients = gradients_of(compiled, leaves, list(leaves.values()))
        expected, reference = gradients_of(loss, leaves, list(leaves.values()))
        assert abs(found - expected).item() < 1e-9
        assert max(gradient_errors(gradients, reference).values()) < 1e-9
    return mstc.reports()


def test_a_dynamic_length_runs_in_chunks() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = torch.sigmoid(q @ k.mT)
        return ((a @ v) / a.sum(-1, keepdim=True)).square().mean()

    (report,) = dynamic(loss, (Q, 50))
    assert sum("attention by queries" in e.what for e in report.edits) == 1, report.refusals


def test_a_state_of_a_dynamic_length_is_no_attention() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (F.softmax(q, -1) @ (k.sigmoid().mT @ v)).square().mean()

    (report,) = dynamic(loss, (Q, 50))
    assert not [x for x in (*report.edits, *report.refusals) if x.pass_name == "query_chunks"]


# ------------------------------------------------------------------ what is no attention, or stays as it is


def test_rows_that_need_all_queries_stay() -> None:
    """Sinkhorn: each step is normalized over queries too."""

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = q @ k.mT
        for _ in range(2):
            a = a - torch.logsumexp(a, -1, keepdim=True)
            a = a - torch.logsumexp(a, -2, keepdim=True)
        return end(a.exp() @ v)

    leaves = leaves_of(Form(loss), B, H, Q, D)
    result = compare(loss, leaves, list(leaves.values()), options())
    result.check()
    assert attention_loops(result) == 0
    assert "also read by logsumexp_1" in refusals(result)[0]


class Experts(nn.Module):
    """Grouped products with weights of three dimensions, and a state instead of scores."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = (nn.Parameter(0.1 * torch.randn(3, *s)) for s in ((8, 16), (16, 8)))
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.qkv = nn.Linear(8, 24)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        each = x.flatten(0, 1).expand(3, -1, -1)
        x = x + torch.bmm(torch.relu(torch.bmm(each, self.up)) ** 2, self.down).sum(0).view_as(x)
        hidden = torch.einsum("bsd,edf->ebsf", x, self.up).sigmoid()
        x = x + torch.einsum("ebsf,efd->bsd", hidden, self.down)
        q, k, v = self.qkv(self.mlp(x)).chunk(3, -1)
        y: Tensor = F.softmax(q, -1) @ (F.softmax(k, -2).mT @ v)
        return y.square().mean()


class Projections(nn.Module):
    """Weights of more than two dimensions, and a mean over the tokens behind them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Parameter(torch.randn(2, 8, 8))
        self.point = nn.Conv1d(8, 8, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("htd,hde->hte", x, self.blocks).relu().mean(1)
        return (y + self.point(x.mT).relu().mean(-1)).square().mean()


@pytest.mark.parametrize("kind", [Experts, Projections])
def test_products_with_weights_and_states_are_no_attention(kind: type[nn.Module]) -> None:
    model = kind()
    result = compare(model, dict(model.named_parameters()), [randn(B, Q, 8)], options())
    result.check()
    assert attention_loops(result) == 0
    assert refusals(result) == []


def test_scores_that_are_added_to_their_own_transpose_stay() -> None:
    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        a = q @ k.mT
        return end(F.softmax(a + a.mT, -1) @ v)

    leaves = leaves_of(Form(loss), B, H, Q, D)
    result = compare(loss, leaves, list(leaves.values()), options())
    result.check()
    assert attention_loops(result) == 0
    assert ["nothing proves" in reason for reason in refusals(result)] == [True]


def test_a_bias_that_needs_all_queries_is_told() -> None:
    """Transformer-XL shifts its second scores by a view across rows."""

    def loss(q: Tensor, k: Tensor, v: Tensor, far: Tensor) -> Tensor:
        b, h, n, _ = q.shape
        bias = torch.cat([torch.zeros(b, h, n, 1, dtype=q.dtype), q @ far.mT], -1)
        bias = bias.view(b, h, n + 1, n)[:, :, 1:]
        return end(F.softmax(q @ k.mT + bias, -1) @ v)

    leaves = leaves_of(Form(loss), B, H, Q, D) | {"far": randn(1, H, Q, D, seed=5)}
    result = compare(loss, leaves, list(leaves.values()), options())
    result.check()
    assert attention_loops(result) == 1
    assert ["nothing proves" in reason for reason in refusals(result)] == [True]
