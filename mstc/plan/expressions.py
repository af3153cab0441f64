"""The costs of a call as sympy expressions in B (sequences), S (tokens of each) and C (tokens per chunk)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy

from mstc.plan.calls import Call, Step

B, S, C = sympy.symbols("B S C", positive=True)


@dataclass(frozen=True)
class Costs:
    """FLOPs and bytes moved of forward and backward, temporaries of both, and bytes made and kept for the backward."""

    flops: tuple[Any, Any]
    moved: tuple[Any, Any]
    work: tuple[Any, Any]
    kept: Any

    def to_dict(self) -> dict[str, str]:
        pairs = {"flops": self.flops, "moved": self.moved, "work": self.work}
        named = {
            f"{name} {way}": e for name, es in pairs.items() for way, e in zip(("forward", "backward"), es, strict=True)
        }
        return {name: str(e) for name, e in {**named, "kept": self.kept}.items()}


def costs_of(call: Call, step: Step, batch: int, tokens: int) -> Costs:
    """The expressions behind a call that was read at ``batch`` sequences of ``tokens``.

    Everything but the scores of attention is linear in the tokens; a loop reads its weights once per chunk and
    has temporaries for one chunk.
    """
    n = batch * tokens
    linear = B * S
    growth = linear * S / (n * tokens) if call.kind == "mixer" else linear / n
    flops = tuple(_whole(x) * growth for x in call.cost.flops)
    kept = sum(step.sizes[m] for m in call.keeps if m in call.makes)
    if call.program is None:
        moved = tuple(_whole(x) * linear / n for x in call.cost.moved)
        forward, backward = call.cost.work
        return Costs(flops, moved, (sympy.Integer(forward), sympy.Integer(backward)), kept * linear / n)
    one, two, many = (call.in_chunks(count).cost for count in (1, 2, 4))
    weights = [b - a for a, b in zip(one.moved, two.moved, strict=True)]
    moved = tuple(_whole(w) * linear / C + _whole(a - w) * linear / n for w, a in zip(weights, one.moved, strict=True))
    slopes = [(a - b) / (two.rows - many.rows) for a, b in zip(two.work, many.work, strict=True)]
    work = tuple(_whole(b - slope * many.rows) + _whole(slope) * C for slope, b in zip(slopes, many.work, strict=True))
    return Costs(flops, moved, work, kept * linear / n)


def _whole(value: float) -> Any:
    return sympy.nsimplify(round(value, 3), rational=True)
