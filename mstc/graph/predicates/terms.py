"""What a mask says about one pair of positions, as a formula.

A tensor is read at an index (a tuple of expressions in the query's position i, the key's
position j, the batch and head). What stands there is a *value*:

- a sympy expression: an exact integer, linear in positions, sizes and *leaves* (symbols for
  values that are only known at run time);
- `Real`: a number that is not an integer of moderate size (−∞, finfo.min, 0.5);
- `Choice`: one of two values, by a formula;
- a *formula*: what stands in a tensor of booleans.

Formulas are kept in negation normal form. Their atoms:

    AtMost(e)      e <= 0     e exact, over positions and sizes only
    Same(e)        e == 0     e holds leaves; exact modulo 2**64, as int64 arithmetic is
    Ordered(a, b)  a <= b     a or b holds leaves, which may wrap: never folded, see `runs`
    Holds(v)       v          a boolean leaf

Every constructor only folds what is exactly equal for every value of its symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy

Expr: TypeAlias = Any  # sympy.Expr; sympy has no types

EXACT_INTEGERS = 2**53  # a float beyond it is kept as `Real`


@dataclass(frozen=True)
class Real:
    """A constant that is not a moderate integer."""

    value: float


@dataclass(frozen=True)
class Truth:
    """True or false."""

    value: bool


@dataclass(frozen=True)
class AtMost:
    """``expr <= 0``."""

    expr: Expr


@dataclass(frozen=True)
class Same:
    """``expr == 0``, modulo 2**64."""

    expr: Expr


@dataclass(frozen=True)
class Ordered:
    """``low <= high``, where either may wrap around."""

    low: Expr
    high: Expr


@dataclass(frozen=True)
class Holds:
    """A boolean that is only known at run time."""

    symbol: Expr


@dataclass(frozen=True)
class Not:
    """The negation of an atom."""

    atom: Same | Ordered | Holds


@dataclass(frozen=True)
class And:
    """All of them."""

    terms: frozenset[Formula]


@dataclass(frozen=True)
class Or:
    """Any of them."""

    terms: frozenset[Formula]


@dataclass(frozen=True)
class Choice:
    """``then`` where ``condition`` holds, else ``other``; at least one is not a formula."""

    condition: Formula
    then: Value
    other: Value


Formula: TypeAlias = Truth | AtMost | Same | Ordered | Holds | Not | And | Or
Value: TypeAlias = Expr | Real | Choice | Formula

FORMULAS = (Truth, AtMost, Same, Ordered, Holds, Not, And, Or)
TRUE = Truth(True)
FALSE = Truth(False)


def number(value: float) -> Value:
    """A Python number as a value: integers as expressions, what is not a moderate integer as `Real`."""
    if isinstance(value, bool):
        return Truth(value)
    if isinstance(value, int) or (abs(value) <= EXACT_INTEGERS and value == int(value)):
        return sympy.Integer(int(value))
    return Real(value)


def constant(value: Value) -> float | None:
    """The Python number behind a constant, None if it is not one."""
    if isinstance(value, Real):
        return value.value
    if isinstance(value, Truth):
        return value.value
    if not isinstance(value, (Choice, *FORMULAS)) and value.is_Integer:
        return int(value)
    return None


def at_most(expr: Expr) -> Formula:
    """``expr <= 0``."""
    expr = sympy.expand(expr)
    return Truth(bool(expr <= 0)) if expr.is_Integer else AtMost(expr)


def equal(expr: Expr) -> Formula:
    """``expr == 0`` over positions and sizes."""
    return conj(at_most(expr), at_most(-expr))


def same(expr: Expr) -> Formula:
    """``expr == 0`` modulo 2**64; ``expr`` is written with the sign that its text sorts first."""
    expr = sympy.expand(expr)
    if expr.is_Integer and abs(expr) < 2**63:
        return Truth(bool(expr == 0))
    negative = sympy.expand(-expr)
    return Same(min(expr, negative, key=sympy.default_sort_key))


def conj(*terms: Formula) -> Formula:
    """All of ``terms``."""
    flat = _flatten(terms, And, FALSE)
    if flat is None:
        return FALSE
    if not flat:
        return TRUE
    return next(iter(flat)) if len(flat) == 1 else And(flat)


def disj(*terms: Formula) -> Formula:
    """Any of ``terms``."""
    flat = _flatten(terms, Or, TRUE)
    if flat is None:
        return TRUE
    if not flat:
        return FALSE
    return next(iter(flat)) if len(flat) == 1 else Or(flat)


def _flatten(terms: tuple[Formula, ...], kind: type[And] | type[Or], absorbing: Truth) -> frozenset[Formula] | None:
    """The parts of a conjunction or disjunction, None where the absorbing element is among them."""
    flat: set[Formula] = set()
    for term in terms:
        if isinstance(term, kind):
            flat |= term.terms
        elif not isinstance(term, Truth):
            flat.add(term)
        elif term == absorbing:
            return None
    if any(negate(term) in flat for term in flat):
        return None
    return frozenset(flat)


def negate(term: Formula) -> Formula:
    """Not ``term``; an integer is above 0 when it is at least 1."""
    if isinstance(term, Truth):
        return Truth(not term.value)
    if isinstance(term, AtMost):
        return at_most(1 - term.expr)
    if isinstance(term, Not):
        return term.atom
    if isinstance(term, And):
        return disj(*map(negate, term.terms))
    if isinstance(term, Or):
        return conj(*map(negate, term.terms))
    return Not(term)


def choose(condition: Formula, then: Value, other: Value) -> Value:
    """``then`` where ``condition`` holds, else ``other``."""
    if isinstance(condition, Truth):
        return then if condition.value else other
    if type(then) is type(other) and then == other:
        return then
    if isinstance(then, FORMULAS) and isinstance(other, FORMULAS):
        return disj(conj(condition, then), conj(negate(condition), other))
    return Choice(condition, then, other)


def map_atoms(term: Formula, rewrite: Callable[[Formula], Formula]) -> Formula:
    """The formula with each atom rewritten."""
    if isinstance(term, And):
        return conj(*(map_atoms(t, rewrite) for t in term.terms))
    if isinstance(term, Or):
        return disj(*(map_atoms(t, rewrite) for t in term.terms))
    if isinstance(term, Not):
        return negate(rewrite(term.atom))
    return rewrite(term)


def atoms(term: Formula) -> Iterator[Formula]:
    """Every atom, without its negation."""
    if isinstance(term, And | Or):
        for part in term.terms:
            yield from atoms(part)
    elif isinstance(term, Not):
        yield term.atom
    else:
        yield term


def conjuncts(term: Formula) -> frozenset[Formula]:
    """The parts of a conjunction; a single formula is its own only part."""
    return term.terms if isinstance(term, And) else frozenset([term])


def symbols(term: Formula) -> set[Expr]:
    """Every symbol that a formula reads."""
    found: set[Expr] = set()
    for atom in atoms(term):
        if isinstance(atom, AtMost | Same):
            found |= atom.expr.free_symbols
        elif isinstance(atom, Ordered):
            found |= atom.low.free_symbols | atom.high.free_symbols
        elif isinstance(atom, Holds):
            found.add(atom.symbol)
    return found
