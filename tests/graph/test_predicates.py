"""Reading masks symbolically: each verdict against the mask computed densely."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sympy
import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from mstc.graph.predicates.bounds import Box, is_nonnegative
from mstc.graph.predicates.constants import Bands, Ramp, describe
from mstc.graph.predicates.facts import MaskFact
from mstc.graph.predicates.reader import Reader
from mstc.graph.predicates.terms import FALSE, TRUE, AtMost, at_most, choose, conj, disj, negate, number, same
from mstc.graph.predicates.verdict import DROPPED, Unproven, fact_of

MIN = torch.finfo(torch.float32).min


def traced(build: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[fx.GraphModule, fx.Node]:
    """The graph of ``build`` in ATen ops before autograd, and the node that it returns."""
    gm = make_fx(build, tracing_mode="fake", pre_dispatch=True)(*inputs)
    mask = gm.graph.output_node().args[0]
    assert isinstance(mask, fx.Node)
    return gm, mask


def verdict(build: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> MaskFact | Unproven:
    """What is proven of a mask [..., Q, K]; checked against the mask itself."""
    gm, mask = traced(build, *inputs)
    queries, keys = (int(n) for n in mask.meta["val"].shape[-2:])
    found = fact_of(mask, sympy.Integer(queries), sympy.Integer(keys), Reader())
    if isinstance(found, MaskFact):
        check(found, gm, inputs)
    return found


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)


def check(fact: MaskFact, gm: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> None:
    """Assert that a mask keeps exactly the pairs that the fact says."""
    run = _Recorder(gm)
    mask = run.run(*inputs)
    if mask.dtype is not torch.bool:
        assert ((mask == 0) | (mask <= DROPPED)).all()
        mask = mask == 0
    queries, keys = mask.shape[-2:]
    i, j = torch.arange(queries)[:, None], torch.arange(keys)
    said = torch.ones(queries, keys, dtype=torch.bool)
    if fact.causal:
        said &= j <= i
    if fact.window is not None:
        said &= (i - j < fact.window) & (j - i < fact.window)
    if fact.documents is not None:
        ids = run.env[fact.documents].flatten()
        said &= ids[:queries, None] == ids[:keys]
    for row in mask.reshape(-1, queries, keys):
        if fact.padding is None:
            assert torch.equal(row, said)
        else:  # inside what is said, the key alone decides
            assert not (row & ~said).any()
            seen = (row & said).any(0)
            assert torch.equal(row, said & seen)


# ------------------------------------------------------------------ terms and bounds


def test_formulas_fold_only_what_is_equal() -> None:
    x, y = sympy.symbols("x y", integer=True)
    a, b = at_most(x), at_most(y)
    assert conj(a, TRUE) == a
    assert conj(a, FALSE) == FALSE
    assert disj(a, FALSE) == a
    assert disj(a, negate(a)) == TRUE
    assert conj(a, b, negate(a)) == FALSE
    assert negate(negate(conj(a, b))) == conj(a, b)
    assert negate(AtMost(x)) == AtMost(1 - x)
    assert choose(a, TRUE, FALSE) == a
    assert choose(a, FALSE, TRUE) == negate(a)
    assert choose(a, number(1), number(1)) == 1
    assert same(x - y) == same(y - x)
    assert same(sympy.Integer(2**63)) not in (TRUE, FALSE)  # it could be equal after wrapping


def test_bounds_know_the_extents() -> None:
    size = sympy.Symbol("s", integer=True, positive=True)
    free = sympy.Symbol("u", integer=True)
    box = Box()
    i = box.position("i", size)
    assert box.never_above(i - size + 1)
    assert not box.never_above(i - size + 2)
    assert box.never_above(-i)
    assert not box.never_above(i - free)
    assert not is_nonnegative(free)
    assert is_nonnegative(size * size - size)
    assert not is_nonnegative(size - 2)
    assert is_nonnegative(sympy.Rational(1, 2))


def test_a_dtype_must_hold_every_value() -> None:
    box = Box()
    i = box.position("i", sympy.Integer(300))
    assert box.fits(i, torch.int64)
    assert box.fits(i, torch.float32)
    assert not box.fits(i, torch.uint8)
    assert not box.fits(i, torch.int8)
    assert not box.fits(i, torch.bfloat16)  # 257 is no bfloat16
    assert box.fits(i, torch.float16)
    assert not box.fits(i - 1, torch.uint8)
    size = sympy.Symbol("s", integer=True, positive=True)
    j = box.position("j", size)
    assert box.fits(j + 5, torch.int64)
    assert not box.fits(j, torch.int32)


# ------------------------------------------------------------------ buffers


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(4, 4), Ramp(1.0, 0, 0)),
        (torch.arange(5), Ramp(0, 1, 0)),
        (torch.arange(3, 13, 2).view(1, 5), Ramp(3, 2, 1)),
        (torch.arange(6).expand(3, 6), Ramp(0, 1, 1)),
        (torch.tensor([0, 1, 3]), None),
        (torch.tensor([0.0, float("nan"), 2.0]), None),
        (torch.ones(4, 4).tril().view(1, 1, 4, 4), Bands((-1, 3), (0.0, 1.0))),
        (torch.ones(3, 5, dtype=torch.bool).triu(1), Bands((-1, 2), (True, False))),
        (torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), None),
        (torch.ones(2, 4, 4).tril(), None),
        (torch.zeros(0), None),
    ],
)
def test_buffers_are_described(tensor: torch.Tensor, expected: Ramp | Bands | None) -> None:
    assert describe(tensor) == expected


@pytest.mark.parametrize("at", [(0, 1), (700, 3), (999, 999), (3, 998)])
def test_one_wrong_element_of_a_buffer_is_seen(at: tuple[int, int]) -> None:
    tril = torch.ones(1000, 1000).tril()
    assert isinstance(describe(tril), Bands)
    tril[at] = 1 - tril[at]
    assert describe(tril) is None


# ------------------------------------------------------------------ masks, one by one

S = 7


def row() -> torch.Tensor:
    return torch.arange(S)


def column() -> torch.Tensor:
    return torch.arange(S)[:, None]


def causal() -> torch.Tensor:
    return row() <= column()


CAUSAL = {
    "comparison": causal,
    "tril": lambda: torch.ones(S, S).tril() != 0,
    "triu": lambda: torch.triu(torch.ones(S, S, dtype=torch.bool), diagonal=1).logical_not(),
    "square subsequent": lambda: torch.triu(torch.full((S, S), float("-inf")), diagonal=1),
    "masked fill": lambda: torch.zeros(S, S).masked_fill(~causal(), float("-inf")),
    "where": lambda: torch.where(causal(), 0.0, MIN),
    "one minus": lambda: (1.0 - causal().float()) * MIN,
    "log": lambda: causal().float().log(),
    "half": lambda: torch.where(causal(), 0.0, float("-inf")).half(),
    "bfloat16": lambda: (1 - causal().to(torch.bfloat16)) * torch.finfo(torch.bfloat16).min,
    "expanded": lambda: causal()[None, None].expand(2, 3, S, S),
    "sliced": lambda: torch.ones(1, 1, 20, 20).tril()[:, :, :S, :S] == 1,
    "sliced, both moved": lambda: torch.ones(20, 20).tril()[5 : 5 + S, 5 : 5 + S].bool(),
    "transposed": lambda: torch.ones(S, S).triu().t() > 0,
    "flipped": lambda: torch.ones(S, S).triu().flip(0, 1) > 0,
    "view": lambda: causal().reshape(-1).view(1, S, S),
    "counted": lambda: (torch.ones(S, dtype=torch.long).cumsum(0) - 1)[:, None] >= row(),
    "float positions": lambda: torch.arange(S, dtype=torch.float32)[:, None] >= row(),
    "stepped": lambda: torch.arange(0, 2 * S, 2)[:, None] > 2 * row() - 1,
    "maximum": lambda: torch.maximum(column(), row()) == column(),
    "written into a slice": lambda: torch.zeros(S, S).slice_scatter(torch.triu(torch.full((S, S), MIN), 1), 0, 0, S),
    "one more than enough": lambda: causal() & (column() + row() >= 0) & (row() < S),
    "either": lambda: causal() | (column() > row()),
    "window of S": lambda: causal() & (column() - row() < S),
    "constant documents": lambda: causal() & (torch.zeros(S)[:, None] == torch.zeros(S)),
    "gathered": lambda: row()[column()] >= row()[row()],
}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_forms(name: str) -> None:
    found = verdict(CAUSAL[name])
    assert isinstance(found, MaskFact)
    assert (found.kind, found.label) == ("causal", "causal")


def transformers_form(offset: int = 0) -> Callable[[torch.Tensor], torch.Tensor]:
    """The mask of transformers 5 for position ids, without a window."""

    def build(position_ids: torch.Tensor) -> torch.Tensor:
        first = position_ids[:, :1] - 1
        ids = torch.diff(position_ids, prepend=first, dim=-1).ne(1).cumsum(-1)
        batch = torch.arange(position_ids.shape[0])[:, None, None, None]
        i, j = torch.arange(S)[None, None, :, None], torch.arange(S)[None, None, None, :]
        mask = i.new_ones((), dtype=torch.bool) & (ids[batch, i] == ids[batch, j])
        return mask & (position_ids[batch, j] <= position_ids[batch, i] + offset)

    return build


def test_positions_without_restarts_are_one_document() -> None:
    form = transformers_form()
    found = verdict(lambda: form(torch.arange(S)[None].expand(2, S)))
    assert isinstance(found, MaskFact)
    assert found.kind == "causal"


def test_positions_that_come_at_run_time_separate_documents() -> None:
    found = verdict(transformers_form(), torch.tensor([[0, 1, 2, 0, 1, 0, 1]]))
    assert isinstance(found, MaskFact)
    assert (found.kind, found.label) == ("document", "causal, documents")


@pytest.mark.parametrize("positions", [[5, 4, 3, 2, 1, 0, 0], [0, 0, 0, 1, 2, 9, 10], [3, 4, 4, 5, 1, 2, 3]])
def test_the_rule_for_runs_holds_for_any_positions(positions: list[int]) -> None:
    assert isinstance(verdict(transformers_form(), torch.tensor([positions])), MaskFact)


def test_positions_without_documents_are_not_causal() -> None:
    found = verdict(lambda p: p[:, None] >= p, torch.arange(S))
    assert isinstance(found, Unproven)
    assert [leaf.node.op for leaf in found.leaves] == ["placeholder", "placeholder"]


KNOWN = {
    "window": (lambda: causal() & (column() - row() < 3), "sliding_window", "causal, window 3"),
    "window, the other way": (lambda: causal() & (row() > column() - 3), "sliding_window", "causal, window 3"),
    "band": (lambda: (column() - row()).abs() < 3, "sliding_window", "window 3"),
    "tril of tril": (lambda: torch.ones(S, S).tril().triu(-2) != 0, "sliding_window", "causal, window 3"),
    "all": (lambda: column() + row() >= 0, "all_true", "no mask"),
    "zeros": (lambda: torch.zeros(S, S), "all_true", "no mask"),
    "blocks": (lambda: causal() & (column() // 3 == row() // 3), "document", "causal, documents"),
    "blocks, no order": (lambda: column() // 3 == row() // 3, "document", "documents"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_other_structures(name: str) -> None:
    build, kind, label = KNOWN[name]
    found = verdict(build)
    assert isinstance(found, MaskFact)
    assert (found.kind, found.label) == (kind, label)


IDS = torch.tensor([0, 0, 1, 1, 1, 2, 2])
WITH_INPUT = {
    "documents": (lambda d: causal() & (d[:, None] == d), "causal, documents"),
    "documents in a batch": (lambda d: causal() & (d[None, :, None] == d[None, None]), "causal, documents"),
    "documents by int32": (lambda d: causal() & (d.int()[:, None] == d), "causal, documents"),
    "padding": (lambda d: causal() & (d != 2)[None, :], "causal, padding"),
    "padding added": (lambda d: torch.where(causal() & (d != 2), 0.0, MIN), "causal, padding"),
    "padding as bool": (lambda d: causal() & d.bool(), "causal, padding"),
    "all of it": (
        lambda d: causal() & (d[:, None] == d) & (column() - row() < 2) & (d != 1),
        "causal, window 2, documents, padding",
    ),
}


@pytest.mark.parametrize("name", WITH_INPUT)
def test_structures_by_input(name: str) -> None:
    build, label = WITH_INPUT[name]
    found = verdict(build, IDS)
    if name == "documents by int32":  # the conversion may wrap, so the two sides are not the same vector
        assert isinstance(found, Unproven)
    else:
        assert isinstance(found, MaskFact)
        assert found.label == label


UNPROVEN = {
    "a full input": lambda d: d[:, None] + d > 0,
    "document or causal": lambda d: causal() | (d[:, None] == d),
    "another vector": lambda d: causal() & (d[:, None] == d.flip(0)),
    "queries hidden": lambda d: causal() & (d != 0)[:, None],
    "moved diagonal": lambda d: column() + 1 >= row(),
    "anti-causal": lambda d: column() <= row(),
    "prefix": lambda d: causal() | (row() < 2),
    "holes": lambda d: causal() & (column() != row() + 2),
    "weak": lambda d: torch.where(causal(), 0.0, -1e4),
    "ones and zeros added": lambda d: causal().float(),
    "not a number": lambda d: torch.where(causal(), 0.0, float("-inf")) * causal().float(),
    "bias": lambda d: torch.where(causal(), d * 0.5, float("-inf")),
    "random": lambda d: torch.rand(S, S) > 0.5,
    "iotas that wrap": lambda d: (torch.arange(S, dtype=torch.uint8)[:, None] - 3) >= row(),
    "nothing": lambda d: causal() & (column() < row()),
}


@pytest.mark.parametrize("name", UNPROVEN)
def test_what_is_not_proven_says_why(name: str) -> None:
    found = verdict(UNPROVEN[name], IDS)
    assert isinstance(found, Unproven)
    assert found.reason


def test_iotas_that_lose_their_last_bits_are_not_positions() -> None:
    """In bfloat16, 257 is 256: a mask of such iotas is not causal."""

    def rounded() -> torch.Tensor:
        i = torch.arange(400, dtype=torch.bfloat16)
        return i[:, None] >= i

    assert isinstance(verdict(rounded), Unproven)


# ------------------------------------------------------------------ property: whatever is proven is so

Program = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@st.composite
def vectors(draw: st.DrawFn) -> Program:
    """A vector [S] of positions, constants or inputs."""
    kind = draw(st.sampled_from(["iota", "iota", "iota", "ids", "constant", "count", "part"]))
    dtype = draw(st.sampled_from([torch.int64, torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16]))
    scale, shift = draw(st.sampled_from([1, 1, 1, 2, -1])), draw(st.sampled_from([0, 0, 1, -2, 130, 250]))
    if kind == "iota":
        return lambda d, m: torch.arange(len(d), dtype=dtype) * scale + shift
    if kind == "ids":
        return lambda d, m: d if scale == 1 else d * scale + shift
    if kind == "constant":
        return lambda d, m: torch.full_like(d, shift)
    if kind == "count":
        return lambda d, m: torch.ones(len(d), dtype=dtype).cumsum(0, dtype=dtype) - 1
    return lambda d, m: torch.cat([torch.arange(2), torch.arange(len(d))])[2:]


@st.composite
def masks(draw: st.DrawFn, depth: int = 3) -> Program:
    """A boolean mask [S, S]."""
    kind = draw(st.sampled_from(["compare"] * 4 + ["tril", "keys"] + ["and", "or", "not", "where"] * (depth > 0)))
    if kind == "compare":
        a, b = draw(vectors()), draw(vectors())
        op = draw(st.sampled_from([torch.le, torch.lt, torch.ge, torch.gt, torch.eq, torch.ne]))
        shift = draw(st.sampled_from([0, 0, 0, 1, -1, 3]))
        both = draw(st.booleans())  # the same vector on both sides
        return lambda d, m: op((a if both else b)(d, m)[None, :] + shift, a(d, m)[:, None])
    if kind == "tril":
        diagonal, which = draw(st.integers(-2, 2)), draw(st.sampled_from([torch.tril, torch.triu]))
        return lambda d, m: which(torch.ones(len(d) + 1, len(d) + 1), diagonal)[1:, : len(d)] > 0
    if kind == "keys":
        return lambda d, m: m[None, :].expand(len(d), len(d))
    parts = [draw(masks(depth=depth - 1)) for _ in range(2)]
    if kind == "and":
        return lambda d, m: parts[0](d, m) & parts[1](d, m)
    if kind == "or":
        return lambda d, m: parts[0](d, m).logical_or(parts[1](d, m))
    if kind == "not":
        return lambda d, m: ~parts[0](d, m)
    return lambda d, m: torch.where(parts[0](d, m), parts[1](d, m), False)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A mask, boolean or added, that is causal more often than chance would have it."""
    mask = draw(masks())
    if draw(st.booleans()):
        inner = mask
        mask = lambda d, m: inner(d, m) & (torch.arange(len(d))[:, None] >= torch.arange(len(d)))  # noqa: E731
    form = draw(st.sampled_from(["bool", "bool", "fill", "where", "minus"]))
    low = draw(st.sampled_from([MIN, float("-inf")]))
    if form == "fill":
        return lambda d, m: torch.zeros(len(d), len(d)).masked_fill(~mask(d, m), low)
    if form == "where":
        return lambda d, m: torch.where(mask(d, m), torch.zeros(()), low)
    if form == "minus":
        return lambda d, m: (1.0 - mask(d, m).float()) * MIN
    return mask


def _property(program: Program, size: int, data: st.DataObject) -> None:
    ids = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)))
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    verdict(program, ids, seen)


QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(program=programs(), size=st.integers(1, 9), data=st.data())
def test_whatever_is_proven_is_so(program: Program, size: int, data: st.DataObject) -> None:
    _property(program, size, data)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=QUIET)
@given(program=programs(), size=st.integers(1, 9), data=st.data())
def test_whatever_is_proven_is_so_for_long(program: Program, size: int, data: st.DataObject) -> None:
    _property(program, size, data)
