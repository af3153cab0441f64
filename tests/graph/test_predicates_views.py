"""Reading through views and selections: the element read symbolically is the element that is there."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import sympy
import torch
import torch.fx as fx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from mstc.graph.predicates.call import Unread, size
from mstc.graph.predicates.reader import Reader
from mstc.graph.predicates.terms import FORMULAS, TRUE, AtMost, Choice, Formula, Value, at_most, constant, map_atoms

Program = Callable[[], torch.Tensor]


def element(value: Value, at: dict[sympy.Symbol, int]) -> float | None:
    """A value at one place, None if it is not known there."""
    if isinstance(value, Choice):
        return element(value.then if holds(value.condition, at) else value.other, at)
    if isinstance(value, FORMULAS):
        return float(holds(value, at))
    known = constant(value)
    return known if known is not None else constant(sympy.sympify(value).subs(at))


def holds(term: Formula, at: dict[sympy.Symbol, int]) -> bool:
    """A formula over positions at one place."""
    settled = map_atoms(term, lambda a: at_most(a.expr.subs(at)) if isinstance(a, AtMost) else a)
    return settled == TRUE


def agree(program: Program) -> bool:
    """Whether the program could be read; every element that was is compared."""
    gm = make_fx(program, tracing_mode="fake", pre_dispatch=True)()
    node = gm.graph.output_node().args[0]
    assert isinstance(node, fx.Node)
    dense = program()
    reader = Reader()
    index = tuple(reader.box.position(f"k{d}", sympy.Integer(n)) for d, n in enumerate(dense.shape))
    value = reader.value(node, index)
    if reader.leaves:
        return False
    for place in itertools.product(*map(range, dense.shape)):
        read = element(value, dict(zip(index, place, strict=True)))
        assert read is not None
        assert read == dense[place].item()
    return True


VIEWS: dict[str, Program] = {
    "split": lambda: torch.arange(24).view(2, 3, 4),
    "ones": lambda: torch.arange(6).view(1, 2, 1, 3, 1).squeeze(),
    "squeeze some": lambda: torch.arange(6).view(1, 2, 1, 3, 1).squeeze((0, 2)),
    "squeeze one": lambda: torch.arange(6).view(2, 1, 3).squeeze(1),
    "permute": lambda: torch.arange(24).view(2, 3, 4).permute(2, 0, 1),
    "transpose": lambda: torch.arange(24).view(2, 3, 4).transpose(-1, 0),
    "slice": lambda: torch.arange(24)[3:20:4],
    "slice from the end": lambda: torch.arange(24)[-5:-1],
    "select": lambda: torch.arange(24).view(4, 6)[-1],
    "flip": lambda: torch.arange(24).view(4, 6).flip(1),
    "repeat": lambda: torch.arange(4).view(4, 1).repeat(2, 1, 5),
    "unflatten": lambda: torch.arange(12).unflatten(0, (3, -1)),
    "expand and merge": lambda: torch.arange(4)[None].expand(3, 4).reshape(3, 2, 2),
    "index, adjacent": lambda: torch.arange(24).view(2, 3, 4)[:, torch.arange(2)[:, None], torch.arange(3)],
    "index, apart": lambda: torch.arange(24).view(2, 3, 4)[torch.arange(2), :, torch.arange(2)],
    "cat": lambda: torch.cat([torch.arange(3), torch.arange(4) + 7, torch.zeros(2, dtype=torch.long)]),
    "cat, columns": lambda: torch.cat([torch.arange(6).view(2, 3), torch.ones(2, 1, dtype=torch.long)], dim=1),
    "diff": lambda: torch.arange(0, 12, 3).diff(),
    "diff, prepended": lambda: torch.arange(5).diff(prepend=torch.arange(1) - 4),
    "cumsum": lambda: torch.full((2, 5), 3).cumsum(1),
    "tril": lambda: torch.arange(12).view(3, 4).tril(1),
    "triu": lambda: torch.arange(12).view(3, 4).triu(-1),
    "slice scatter": lambda: torch.arange(12).view(3, 4).slice_scatter(torch.arange(2).expand(3, 2), 1, 1, 3),
    "absolute": lambda: (torch.arange(7) - 3).abs(),
    "negative": lambda: -torch.arange(7),
    "minimum": lambda: torch.minimum(torch.arange(7), 6 - torch.arange(7)),
    "comparison of choices": lambda: (torch.arange(7) - 3).abs() >= 2,
    "scalars on the left": lambda: 5 - 2 * torch.arange(4),
    "alpha": lambda: torch.add(torch.arange(4), torch.ones(4, dtype=torch.long), alpha=3),
    "full like": lambda: torch.full_like(torch.arange(4), 2.0, dtype=torch.float32),
    "folded in bfloat16": lambda: torch.full((3,), 0.1, dtype=torch.bfloat16) * 3,
    "wrapped": lambda: torch.full((3,), 250, dtype=torch.uint8) + 10,
    "clamped": lambda: torch.full((3,), -7.5).clamp(min=-2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_what_is_read_is_what_is_there(name: str) -> None:
    assert agree(VIEWS[name])


UNREAD: dict[str, Program] = {
    "flatten": lambda: torch.arange(12).view(3, 4).flatten(),
    "split and merge": lambda: torch.arange(24).view(4, 6).view(2, 2, 6).reshape(4, 6),
    "two positions mixed": lambda: torch.arange(4)[:, None].expand(4, 3).reshape(3, 4),
    "repeated": lambda: torch.arange(4).repeat(3),
    "a product of positions": lambda: torch.arange(4) * torch.arange(4),
    "a negative index": lambda: torch.arange(4)[torch.arange(4) - 4],
    "integers that wrap": lambda: torch.arange(4, dtype=torch.uint8) - 1,
    "a step of a half": lambda: torch.arange(0, 2, 0.5),
    "a sum of positions": lambda: torch.arange(4).cumsum(0),
}


@pytest.mark.parametrize("name", UNREAD)
def test_what_has_no_rule_is_left_unknown(name: str) -> None:
    assert not agree(UNREAD[name])


@st.composite
def chains(draw: st.DrawFn) -> Program:
    """An iota moved about by up to five views."""
    shape = draw(st.sampled_from([(12,), (2, 6), (3, 4), (2, 3, 2), (1, 12), (4, 3, 1)]))
    steps: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["view", "permute", "slice", "flip", "unsqueeze", "expand", "squeeze"]))
        a, b = draw(st.integers(0, 5)), draw(st.integers(0, 5))
        steps.append(_STEPS[kind](a, b))

    def program() -> torch.Tensor:
        value = torch.arange(12).view(shape)
        for step in steps:
            value = step(value)
        return value

    return program


def _factored(value: torch.Tensor, a: int) -> torch.Tensor:
    count = value.numel()
    fitting = [n for n in (2, 3, 4, 1, 6) if count % n == 0]
    first = fitting[a % len(fitting)]
    return value.reshape(first, count // first)


_STEPS: dict[str, Callable[[int, int], Callable[[torch.Tensor], torch.Tensor]]] = {
    "view": lambda a, b: lambda t: _factored(t, a),
    "permute": lambda a, b: lambda t: t.transpose(a % t.dim(), b % t.dim()),
    "slice": lambda a, b: lambda t: t[max(0, min(a, t.shape[0] - 1)) :: 1 + b % 2],
    "flip": lambda a, b: lambda t: t.flip(a % t.dim()),
    "unsqueeze": lambda a, b: lambda t: t.unsqueeze(a % (t.dim() + 1)),
    "expand": lambda a, b: lambda t: t.unsqueeze(0).expand(1 + a % 3, *t.shape),
    "squeeze": lambda a, b: lambda t: t.squeeze(a % t.dim()),
}


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(program=chains())
def test_chains_of_views(program: Program) -> None:
    agree(program)


def test_a_call_with_a_size_that_is_no_integer_is_unread() -> None:
    with pytest.raises(Unread):
        size(1.5)
