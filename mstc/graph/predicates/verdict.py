"""From a mask's node to what it was proven to be, or why it was not.

A boolean mask keeps a pair where it is True. A mask that is added to the scores keeps a pair where it is 0
and drops it where it is −∞. Where it is a large negative number instead (finfo.min), the pair is dropped all
the same, since exp(number + score - largest score) underflows to 0 *while another key of the row is kept*; a row
without any kept key would average all keys instead of giving NaN. A causal row keeps its diagonal, so for the
structures that are rewritten (j <= i, or everything) the two readings agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
import torch
import torch.fx as fx

from mstc.graph.predicates.call import dtype_of, shape_of
from mstc.graph.predicates.facts import Kind, MaskFact, Place, Seen, Vector
from mstc.graph.predicates.pointwise import each
from mstc.graph.predicates.reader import Reader
from mstc.graph.predicates.reading import Leaf
from mstc.graph.predicates.structure import Structure, structure_of
from mstc.graph.predicates.terms import (
    FALSE,
    FORMULAS,
    TRUE,
    Choice,
    Expr,
    Formula,
    Holds,
    Not,
    Real,
    Same,
    Value,
    conjuncts,
    constant,
    negate,
    symbols,
)

# finfo(float16).min, the weakest "minus infinity" that libraries use: exp(-65504) is 0 in every dtype. Weaker ones
# (-1e4) could be outweighed by a large score, so they are not taken for a mask.
DROPPED = -65504.0


@dataclass(frozen=True)
class Unproven:
    """Why a mask's structure could not be proven, and what would help; leaves: the values that stand in the way."""

    reason: str
    leaves: tuple[Leaf, ...] = ()
    remedy: str = "build the mask inside the compiled function from torch.arange, or pass is_causal=True"


def fact_of(mask: fx.Node, queries: Expr, keys: Expr, reader: Reader, *, hides: bool = False) -> MaskFact | Unproven:
    """What a mask [..., queries or 1, keys or 1] was proven to be; hides: it is True where a pair is dropped."""
    shape = shape_of(mask)
    box = reader.box
    i, j = box.position("i", queries), box.position("j", keys)
    leading = [box.position("b", n) for n in shape[:-2]]
    index = tuple(sympy.Integer(0) if extent == 1 else k for extent, k in zip(shape, (*leading, i, j), strict=True))
    value = reader.value(mask, index)
    kept = value if dtype_of(mask) is torch.bool else _kept(value)
    if not isinstance(kept, FORMULAS):
        return kept if isinstance(kept, Unproven) else _blame(value, reader)
    if hides:
        kept = negate(kept)
    found = structure_of(kept, i, j, reader)
    if found is None:
        return Unproven("it keeps a set of positions that is no band of diagonals", _leaves(symbols(kept), reader))
    return _named(found, i, j, leading[0] if len(leading) == 2 else None, reader)


# ------------------------------------------------------------------ masks that are added


class _Added(Exception):
    """A mask adds a number to kept scores."""


def _kept(value: Value) -> Value | Unproven:
    """Where an added mask keeps a score."""

    def one(leaf: Value) -> Value:
        known = constant(leaf)
        if known == 0:
            return TRUE
        if known is not None and known <= DROPPED:
            return FALSE
        raise _Added("" if known is None else f"{known:g}")

    try:
        return each(one, value)
    except _Added as added:
        if str(added):
            return Unproven(f"it adds {added} to scores, which neither keeps nor surely drops them")
        return value


def _blame(value: Value, reader: Reader) -> Unproven:
    """A mask whose numbers are only known at run time."""
    free = _free(value)
    reason = "what it adds to the scores is only known at run time"
    return Unproven(reason, _leaves(free, reader), "none if the model biases its scores (ALiBi, relative positions)")


def _free(value: Value) -> set[Expr]:
    if isinstance(value, FORMULAS):
        return symbols(value)
    if isinstance(value, Choice):
        return symbols(value.condition) | _free(value.then) | _free(value.other)
    return set() if isinstance(value, Real) else set(value.free_symbols)


def _leaves(found: Iterable[Expr], reader: Reader) -> tuple[Leaf, ...]:
    leaves = [reader.leaves[s] for s in found if s in reader.leaves]
    return tuple(sorted(leaves, key=lambda leaf: leaf.node.name))


# ------------------------------------------------------------------ naming


def _named(found: Structure, i: Expr, j: Expr, sequence: Expr | None, reader: Reader) -> MaskFact | Unproven:
    """The structure in people's words, if there are any for it; sequence: the position in the batch, if it has one."""
    documents: Leaf | None = None
    padding: Leaf | None = None
    seen: Seen | None = None
    for part in conjuncts(found.rest) - {TRUE}:
        same = _document(part, i, j, reader)
        only_keys = _padding(part, i, reader)
        if same is not None and documents is None:
            documents = same
        elif only_keys is not None and padding is None:
            padding, seen = only_keys, _seen(part, only_keys, j, sequence)
        else:
            return Unproven("it depends on values in a form that has no name", _leaves(symbols(found.rest), reader))
    if found.low not in (None, 0) and (found.high is None or found.low != -found.high):
        return Unproven(f"it keeps the diagonals from {found.low} to {found.high} (query minus key)")
    if found.low is None and found.high is not None:
        return Unproven(f"it keeps the diagonals up to {found.high} (query minus key)")
    causal = found.low == 0
    window = None if found.high is None else found.high + 1
    ids = None if documents is None else _vector(documents, i, sequence)
    ids_in, seen_in = (None if leaf is None else leaf.node for leaf in (documents, padding))
    return MaskFact(_kind(causal, window, documents, padding), causal, window, ids_in, seen_in, ids, seen)


def _kind(causal: bool, window: int | None, documents: Leaf | None, padding: Leaf | None) -> Kind:
    if documents is not None:
        return "document"
    if padding is not None:
        return "padding"
    if window is not None:
        return "sliding_window"
    return "causal" if causal else "all_true"


def _document(part: Formula, i: Expr, j: Expr, reader: Reader) -> Leaf | None:
    """The leaf f(i), for a condition f(i) == f(j): both sides are leaves, one the other with i and j exchanged."""
    if not isinstance(part, Same):
        return None
    sides = [s for s in part.expr.free_symbols if s in reader.leaves]
    if len(sides) != 2 or part.expr not in (sides[0] - sides[1], sides[1] - sides[0]):
        return None
    first, second = sides if _reads(reader.leaves[sides[0]], i) else sides[::-1]
    leaf = reader.leaves[first]
    if not _reads(leaf, i) or _reads(leaf, j):
        return None
    turned = tuple(k.subs(i, j) for k in leaf.index)
    return leaf if reader.value(leaf.node, turned) == second else None


def _reads(leaf: Leaf, position: Expr) -> bool:
    return any(position in k.free_symbols for k in leaf.index)


def _padding(part: Formula, i: Expr, reader: Reader) -> Leaf | None:
    """The leaf m(j), for a condition on it that reads no query."""
    atom = part.atom if isinstance(part, Not) else part
    if not isinstance(atom, Holds | Same):
        return None
    found = [s for s in symbols(part) if s in reader.leaves]
    if len(found) != 1 or i in symbols(part):
        return None
    leaf = reader.leaves[found[0]]
    return None if _reads(leaf, i) else leaf


def _seen(part: Formula, leaf: Leaf, j: Expr, sequence: Expr | None) -> Seen | None:
    """The condition m(j) as it can be computed."""
    atom, negated = (part.atom, True) if isinstance(part, Not) else (part, False)
    vector = _vector(leaf, j, sequence)
    if vector is None:
        return None
    if isinstance(atom, Holds):
        return Seen(vector, None, negated)
    (symbol,) = symbols(part)
    if not isinstance(atom, Same) or abs(atom.expr.coeff(symbol)) != 1:
        return None  # 2 m == 4 has two solutions modulo 2**64
    equals = (symbol - atom.expr / atom.expr.coeff(symbol)).expand()
    return Seen(vector, int(equals), negated) if equals.is_Integer else None


def _vector(leaf: Leaf, position: Expr, sequence: Expr | None) -> Vector | None:
    """A leaf that is read once per position of each sequence, or of all alike."""
    places: list[Place] = []
    for at in leaf.index:
        if at == position:
            places.append("position")
        elif at.is_Integer:
            places.append(int(at))
        elif at == sequence:
            places.append("sequence")
        else:
            return None
    once = places.count("position") == 1 and places.count("sequence") <= 1
    return Vector(leaf.node, tuple(places)) if once else None
