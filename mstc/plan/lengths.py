"""The same step at another length: sizes follow the tokens, so nothing is captured or traced again."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from mstc.ops.body import Value
from mstc.ops.program import BodyCosts, Program
from mstc.plan.calls import Call, Step


def at_length(step: Step, old: int, new: int) -> Step:
    """The step with ``new`` tokens per sequence instead of ``old``; parameters stay, everything else follows."""
    if old == new:
        return step
    fixed = set(step.parameters) | {m for c in step.calls for m in _untokened(c)}
    sizes = {m: size if m in fixed else size * new // old for m, size in step.sizes.items()}
    programs: dict[str, Program] = {}
    calls = [_call(c, old, new, programs) for c in step.calls]
    return replace(step, calls=calls, sizes=sizes)


def _untokened(call: Call) -> tuple[str, ...]:
    """Results of a loop that have no tokens: sums, and gradients of what all tokens share."""
    p = call.program
    if p is None:
        return ()
    if call.kind == "loop":
        return call.makes[len(p.outputs) :]
    tokened = len(p.sums) + len(p.outputs) + sum(p.token_needs)
    return (*call.makes[: len(p.sums)], *call.makes[tokened:])


def _call(call: Call, old: int, new: int, programs: dict[str, Program]) -> Call:
    ratio = new / old
    if call.program is not None:
        p = call.program
        savings = tuple(replace(s, program=_scaled_program(s.program, old, new, programs)) for s in call.savings)
        p = _scaled_program(p, old, new, programs)
        return replace(call, program=p, savings=savings).in_chunks(p.count)
    powers = ratio * ratio if call.kind == "mixer" else ratio
    flops, moved = call.cost.flops, call.cost.moved
    grown = replace(call.cost, flops=(flops[0] * powers, flops[1] * powers), moved=(moved[0] * ratio, moved[1] * ratio))
    return replace(call, cost=grown)


def _scaled_program(p: Program, old: int, new: int, known: dict[str, Program]) -> Program:
    if p.key not in known:
        known[p.key] = _program(p, old, new)
    return known[p.key]


def _program(p: Program, old: int, new: int) -> Program:
    """A program over another number of tokens, in chunks of about the same length."""
    n = p.n * new // old
    count = max(round(n / p.costs.length), 1)
    return replace(
        p,
        key=f"{p.key} {n}",
        n=n,
        count=count,
        tokens=tuple(_value(v, n) for v in p.tokens),
        outputs=tuple(_value(v, n) for v in p.outputs),
        measure=partial(_scaled, p, -(-n // count)),
    )


def _scaled(p: Program, length: int) -> BodyCosts:
    """What a chunk of another length costs: FLOPs and bytes follow the tokens."""
    ratio = length / p.costs.length

    def bytes_of(values: tuple[int, int]) -> tuple[int, int]:
        return int(values[0] * ratio), int(values[1] * ratio)

    forward, backward = p.costs.flops
    flops = (forward * ratio, backward * ratio)
    return BodyCosts(length, flops, bytes_of(p.costs.live), p.costs.kernels, bytes_of(p.costs.largest))


def _value(v: Value, n: int) -> Value:
    return v if v.cut is None else replace(v, shape=v.cut.shape(v.shape, n))
