"""Documents that are packed into one row, told by where the positions start again.

For positions p the vector r[k] = sum over t <= k of [p[t] - p[t-1] != 1] numbers the runs in which p counts
up by one. The summands are never negative, so r[i] == r[j] makes each of them 0 between j and i, hence

    r[i] == r[j]   =>   p[i] - p[j] == i - j,

and under r[i] == r[j] a comparison of p[i] with p[j] is one of i with j. Positions are taken not to wrap
around 2**63 (they count tokens); facts that rest on this label a mask and never rewrite a call.
"""

from __future__ import annotations

import sympy

from mstc.graph.predicates.reading import Reading, Run
from mstc.graph.predicates.terms import (
    FALSE,
    FORMULAS,
    TRUE,
    AtMost,
    Expr,
    Formula,
    Not,
    Ordered,
    Same,
    Value,
    at_most,
    conj,
    conjuncts,
    map_atoms,
)


def run_of(summand: Value, at: Expr, position: Expr, reader: Reading) -> Run | None:
    """The run that a cumulative sum of ``summand`` over t <= ``position`` numbers, if it numbers one.

    at: the position t at which ``summand`` stands.
    """
    if not isinstance(summand, FORMULAS):
        return None
    behind_first = map_atoms(summand, lambda atom: _after_first(atom, at))
    if not isinstance(behind_first, Not) or not isinstance(behind_first.atom, Same):
        return None
    step = behind_first.atom.expr
    leaves = [s for s in step.free_symbols if s in reader.leaves]
    for here in leaves:
        for sign in (1, -1):
            before = sympy.expand(here - 1 - sign * step)
            if before in leaves and _precedes(before, here, at, reader):
                leaf = reader.leaves[here]
                value = reader.value(leaf.node, tuple(k.subs(at, position) for k in leaf.index))
                return Run(value, position) if value in reader.leaves else None
    return None


def _after_first(atom: Formula, at: Expr) -> Formula:
    """What is known of ``t <= 0`` and ``t >= 1`` behind the first element."""
    if isinstance(atom, AtMost) and atom.expr == at:
        return FALSE
    if isinstance(atom, AtMost) and atom.expr == 1 - at:
        return TRUE
    return atom


def _precedes(before: Expr, here: Expr, at: Expr, reader: Reading) -> bool:
    """Whether one leaf is the other one element earlier."""
    first, second = reader.leaves[before], reader.leaves[here]
    moved = tuple(sympy.expand(k.subs(at, at - 1)) for k in second.index)
    return first.node is second.node and first.index == moved and second.index != moved


def use_runs(term: Formula, reader: Reading) -> Formula:
    """The formula with comparisons inside one run written over positions."""
    parts = conjuncts(term)
    steps: dict[Expr, Expr] = {}
    for part in parts:
        if isinstance(part, Same):
            steps.update(_step(part.expr, reader))
    if not steps:
        return term
    rewritten = (map_atoms(part, lambda atom: _inside(atom, steps, reader)) for part in parts)
    return conj(*rewritten)


def _step(expr: Expr, reader: Reading) -> dict[Expr, Expr]:
    """``{p[i]: p[j] + i - j}`` for an equality of run numbers, else nothing."""
    numbered = [s for s in expr.free_symbols if s in reader.runs]
    for a in numbered:
        for b in numbered:
            if expr == a - b:
                first, second = reader.runs[a], reader.runs[b]
                return {first.symbol: second.symbol + first.position - second.position}
    return {}


def _inside(atom: Formula, steps: dict[Expr, Expr], reader: Reading) -> Formula:
    """An order of positions, if one run's rule makes it one of indices."""
    if not isinstance(atom, Ordered):
        return atom
    rest = sympy.expand((atom.low - atom.high).subs(steps))
    return atom if rest.free_symbols & reader.leaves.keys() else at_most(rest)
