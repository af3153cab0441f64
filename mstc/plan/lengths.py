"""A step as polynomials in S, the tokens of a sequence: read at three lengths, evaluated at any other.

A dimension of a tensor is a number, S, or a number of pieces of S, and at most two of them grow (scores), so bytes and
FLOPs are polynomials of the second degree, which three readings tell exactly. Nothing is captured or traced again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import sympy

from mstc.errors import PlanError
from mstc.ops.body import Value
from mstc.ops.pieces import Cut
from mstc.ops.program import BodyCosts, Program
from mstc.plan.calls import Call, Step
from mstc.plan.stages import Extra
from mstc.plan.work import Cost

S = sympy.Symbol("S", positive=True)


def readings(shortest: int) -> tuple[int, int, int]:
    """The lengths to read a step at."""
    return shortest, shortest * 3 // 2, 2 * shortest


@lru_cache(maxsize=1 << 14)
def polynomial(tokens: tuple[int, ...], values: tuple[float, ...]) -> sympy.Poly:
    """The polynomial in S that has these ``values`` at these ``tokens``."""
    if len(set(values)) == 1:
        return sympy.Poly(sympy.Rational(values[0]), S)
    points = [(n, sympy.Rational(v)) for n, v in zip(tokens, values, strict=True)]
    return sympy.Poly(sympy.interpolate(points, S), S)


class Growing:
    """A step of any length. Raises `PlanError` where the step is not the same at each of the lengths.

    tokens: the lengths that ``steps`` were read at; extras: of their stages, at each length.
    """

    def __init__(self, tokens: Sequence[int], steps: Sequence[Step], extras: Sequence[tuple[Extra, ...]] = ()) -> None:
        self.tokens, self.steps, self._extras = tuple(tokens), tuple(steps), tuple(extras)
        for step in self.steps[1:]:
            _require_alike(self.steps[0], step, self.tokens)

    def at(self, tokens: int) -> Step:
        """The step with so many tokens per sequence."""
        if tokens in self.tokens:
            return self.steps[self.tokens.index(tokens)]
        return _Evaluation(self.tokens, tokens).step(self.steps)

    def extras_at(self, tokens: int) -> tuple[Extra, ...]:
        """What the stages hold besides, with so many tokens per sequence."""

        def number(values: Iterable[int]) -> int:
            return round(float(polynomial(self.tokens, tuple(values)).eval(tokens)))

        return tuple(
            Extra(number(e.saved for e in same), number(e.forward for e in same), number(e.backward for e in same))
            for same in zip(*self._extras, strict=True)
        )

    def expression(self, values: Sequence[float]) -> sympy.Expr:
        """What has these values at the lengths that were read, in S."""
        return polynomial(self.tokens, tuple(values)).as_expr()


def _require_alike(one: Step, other: Step, tokens: tuple[int, ...]) -> None:
    def told(call: Call) -> tuple[Any, ...]:
        flows = (call.reads, call.makes, call.keeps, call.grads, call.needs)
        return (call.name, call.kind, call.label, call.again, flows, _form(call.program))

    pairs = list(zip(one.calls, other.calls, strict=False))
    odd = next((a for a, b in pairs if told(a) != told(b)), None)
    if odd is None and len(one.calls) == len(other.calls) and one.sizes.keys() == other.sizes.keys():
        return
    where = f"first at {odd.label} ({odd.name})" if odd else "in the number of its ops"
    raise PlanError(
        f"the step is another one at other lengths ({where}), so what was read at {', '.join(map(str, tokens))} tokens "
        "tells nothing of the others; plan a function whose ops do not depend on the length"
    )


def _form(program: Program | None) -> tuple[Any, ...]:
    """What a program has at any length: how many values of each kind, and which dimensions of them are cut."""
    if program is None:
        return ()
    kinds = (program.tokens, program.shared, program.outputs, program.sums)
    return tuple(tuple((len(v.shape), v.cut and v.cut.dim, v.dtype) for v in values) for values in kinds)


class _Evaluation:
    """Numbers that were read at several lengths, at one more."""

    def __init__(self, known: tuple[int, ...], wanted: int) -> None:
        self._known, self._wanted = known, wanted
        self._programs: dict[str, Program] = {}

    def step(self, steps: Sequence[Step]) -> Step:
        sizes = {m: self._whole([s.sizes[m] for s in steps]) for m in steps[0].sizes}
        calls = [self._call(calls) for calls in zip(*(s.calls for s in steps), strict=True)]
        return replace(steps[0], calls=calls, sizes=sizes)

    def _number(self, values: Sequence[float]) -> float:
        return max(float(polynomial(self._known, tuple(values)).eval(self._wanted)), 0.0)

    def _whole(self, values: Sequence[Any]) -> int:
        return round(self._number(values))

    def _pair(self, pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
        first, second = zip(*pairs, strict=True)
        return self._number(first), self._number(second)

    def _whole_pair(self, pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
        first, second = self._pair(pairs)
        return round(first), round(second)

    def _call(self, calls: Sequence[Call]) -> Call:
        call = calls[0]
        if call.program is None:
            costs = [c.cost for c in calls]
            work = self._whole_pair([c.work for c in costs])
            if call.kind == "queries":  # cut by the bytes of a chunk: these are alike at every length
                work = (max(c.work[0] for c in costs), max(c.work[1] for c in costs))
            cost = Cost(
                work,
                self._pair([c.flops for c in costs]),
                self._pair([c.moved for c in costs]),
                self._number([c.rows for c in costs]),
                self._pair([c.fresh for c in costs]),
                self._whole_pair([c.kernels for c in costs]),
            )
            return replace(call, cost=cost, exchanged=self._whole([c.exchanged for c in calls]))
        program = self._program([c.program for c in calls])
        by_values = [{s.values: s for s in c.savings} for c in calls]
        savings = tuple(
            replace(s, program=self._program([found[s.values].program for found in by_values]))
            for s in call.savings
            if all(s.values in found for found in by_values)
        )
        return replace(call, program=program, savings=savings).in_chunks(program.count)

    def _program(self, programs: Sequence[Program | None]) -> Program:
        """A program over another number of tokens, in chunks of about the same length."""
        same = [p for p in programs if p is not None]
        key = same[0].key
        if key not in self._programs:
            n = max(self._whole([p.n for p in same]), 1)
            count = max(round(n / same[0].costs.length), 1)
            self._programs[key] = replace(
                same[0],
                key=f"{key} {n}",
                n=n,
                count=count,
                tokens=self._values([p.tokens for p in same]),
                shared=self._values([p.shared for p in same]),
                outputs=self._values([p.outputs for p in same]),
                sums=self._values([p.sums for p in same]),
                measure=partial(self._costs, [p.costs for p in same], -(-n // count)),
            )
        return self._programs[key]

    def _values(self, several: Sequence[tuple[Value, ...]]) -> tuple[Value, ...]:
        return tuple(self._value(values) for values in zip(*several, strict=True))

    def _value(self, values: Sequence[Value]) -> Value:
        cuts = [v.cut for v in values if v.cut is not None]
        cut = None
        if cuts:
            cut = Cut(cuts[0].dim, self._whole([c.outer for c in cuts]), self._whole([c.inner for c in cuts]))
        shapes = zip(*(v.shape for v in values), strict=True)
        return replace(values[0], shape=tuple(self._whole(sizes) for sizes in shapes), cut=cut)

    def _costs(self, several: Sequence[BodyCosts], length: int) -> BodyCosts:
        """What a chunk of ``length`` costs: FLOPs and bytes follow its tokens."""

        def per_index(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
            first, second = self._pair([(a / c.length, b / c.length) for (a, b), c in zip(pairs, several, strict=True)])
            return first * length, second * length

        def whole(pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
            first, second = per_index(pairs)
            return int(first), int(second)

        live, pooled = whole([c.live for c in several]), whole([c.pooled for c in several])
        flops, largest = per_index([c.flops for c in several]), whole([c.largest for c in several])
        return BodyCosts(length, flops, live, pooled, several[0].kernels, largest)
