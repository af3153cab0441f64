"""The costs of a call as sympy expressions in B (sequences), S (tokens of each), C (tokens per chunk) and R (ranks).

They are those of one of R ranks, over which the sequences are sharded: every rank has S / R tokens of each, all the
weights, and what attention reads of other ranks comes to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy

from mstc.plan.borders import read_backward
from mstc.plan.calls import Call, Step
from mstc.plan.lengths import Growing, S

__all__ = ["B", "C", "Costs", "R", "S", "costs_of", "kinds_of"]

B, C, R = sympy.symbols("B C R", positive=True)


@dataclass(frozen=True)
class Costs:
    """FLOPs, bytes moved, temporaries and bytes sent, of forward and backward; bytes kept: results that a backward
    reads."""

    flops: tuple[Any, Any]
    moved: tuple[Any, Any]
    work: tuple[Any, Any]
    sent: tuple[Any, Any]
    kept: Any

    def to_dict(self) -> dict[str, str]:
        """Each expression as text, by a name such as "flops forward"."""
        pairs = {"flops": self.flops, "moved": self.moved, "live": self.work, "sent": self.sent}
        named = {
            f"{name} {way}": e for name, es in pairs.items() for way, e in zip(("forward", "backward"), es, strict=True)
        }
        return {name: str(e) for name, e in {**named, "kept": self.kept}.items()}


def kinds_of(growing: Growing, batch: int) -> dict[str, Costs]:
    """The costs of one call of each kind of loop, attention and scan, by label; of several alike, of the first."""
    found: dict[str, Costs] = {}
    for at, call in enumerate(growing.steps[0].calls):
        if (call.kind != "op" or not call.cheap) and any(call.cost.flops) and call.label not in found:
            found[call.label] = costs_of(growing, at, batch)
    return found


def costs_of(growing: Growing, at: int, batch: int) -> Costs:
    """The expressions behind the call at position ``at``, which was read with ``batch`` sequences."""
    calls = [step.calls[at] for step in growing.steps]
    call = calls[0]

    def grown(values: Iterable[float]) -> Any:
        return _of_a_rank(growing.expression(list(values)), batch)

    def both(pairs: Sequence[tuple[float, float]]) -> tuple[Any, Any]:
        first, second = zip(*pairs, strict=True)
        return grown(first), grown(second)

    flops = both([c.cost.flops for c in calls])
    kept = grown(sum(step.sizes[m] for m in call.makes if m in read) for step, read in _read_backward(growing))
    sent = _sent(growing, at, batch, grown)
    if call.program is None:
        moved, work = both([c.cost.moved for c in calls]), both([c.cost.work for c in calls])
        return Costs(flops, moved, work, sent, kept)
    weights = [_difference(c) for c in calls]
    tokens = [
        tuple(m - w for m, w in zip(c.in_chunks(1).cost.moved, ws, strict=True))
        for c, ws in zip(calls, weights, strict=True)
    ]
    per_chunk = tuple(sympy.Rational(w) * B * S / (R * C) for w in weights[0])
    moved = tuple(a + b for a, b in zip(per_chunk, both([(x, y) for x, y in tokens]), strict=True))
    return Costs(flops, (moved[0], moved[1]), _live(call), sent, kept)


def _read_backward(growing: Growing) -> list[tuple[Step, set[str]]]:
    return [(step, read_backward(step)) for step in growing.steps]


def _of_a_rank(expression: Any, batch: int) -> Any:
    """What was read of ``batch`` sequences, of B sequences on one of R ranks: what grows with the tokens is shared."""
    whole = sympy.Poly(expression, S)
    constant = whole.coeff_monomial(1)
    growing = whole.as_expr() - constant
    return sympy.expand(growing * B / (batch * R)) + constant


def _difference(call: Call) -> tuple[float, float]:
    """Bytes that each further chunk moves: the weights, read again."""
    one, two = (call.in_chunks(count).cost.moved for count in (1, 2))
    return two[0] - one[0], two[1] - one[1]


def _live(call: Call) -> tuple[Any, Any]:
    """Temporaries of a loop: a part that is there whatever the chunk, and one that follows its tokens."""
    two, many = (call.in_chunks(count).cost for count in (2, 4))
    rows = sympy.Rational(two.rows - many.rows)
    slopes = [sympy.Rational(a - b) / rows for a, b in zip(two.work, many.work, strict=True)]
    first, second = (
        sympy.Rational(b) - slope * sympy.Rational(many.rows) + slope * C
        for slope, b in zip(slopes, many.work, strict=True)
    )
    return first, second


def _sent(growing: Growing, at: int, batch: int, grown: Callable[[Iterable[float]], Any]) -> tuple[Any, Any]:
    """Bytes that a rank sends.

    Gradients of weights are summed by a ring all-reduce (Patarasuk and Yuan 2009), 2 (R - 1) / R of their bytes. Keys
    and values go around, and in the backward once more, with their gradients (ring attention, Liu et al. 2023). Of a
    scan each rank gives its state to all others, and its gradient (LASP-2, Sun et al. 2025).
    """
    share = (R - 1) / R
    step = growing.steps[0]
    call = step.calls[at]
    weights = share * 2 * sum(step.sizes[m] for m in call.grads if m in step.parameters)
    if call.kind == "mixer":
        around = (R - 1) * grown(s.calls[at].exchanged for s in growing.steps)
        return around, 2 * around + weights
    state = (R - 1) * sympy.Integer(call.exchanged) * B / batch
    return state, state + weights
