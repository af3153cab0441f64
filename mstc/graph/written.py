"""Attention that is written out: scores of queries and keys, then products with the values.

    o[i] = sum_j w[i, j] v[j],    w[i, :] = f(s[i, :], i),    s[i, j] = q[i] . k[j]

Queries and keys come from the same tokens, so along the tokens this is a mixer. But a row of scores belongs to one
query alone: along the queries everything from the scores to o is tokenwise, with keys and values shared.
Nothing here looks at names, and f may be anything: a softmax, one written by hand, a sigmoid, a decay.

The search starts at a product (or, where none meets them, at a sum or difference) in which one place comes from one
operand, the queries, and another place from another, the keys. Both are followed forward through the axis rules to the
nodes in which only the queries are left: products with values and reductions over the keys. Those that lead back (a
row's maximum, its normalizer) belong to the stretch, the others end it. From the ends the search walks back. A value
in which both places stand has S x S elements. Those are taken into the stretch, down to where only one of the two is
left: queries, keys, positions, per-head slopes, tables of relative positions. So masks and biases are made chunk by
chunk as well, never whole.

Nodes of such a stretch may have other readers (a bias that all layers share): those keep them, the stretch has its
own copy. Finding edits nothing.
"""

from __future__ import annotations

import heapq
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from mstc.graph.attention import is_attention
from mstc.graph.axes import Tokenwise
from mstc.graph.costs import UNKNOWN_LENGTH
from mstc.graph.editor import has_order
from mstc.graph.pairs import (
    DROPOUT,
    beside,
    flow_along,
    inputs_of,
    is_end,
    is_product,
    kept,
    kept_before,
    may_combine,
    one_of,
    parts_of,
)
from mstc.graph.places import DimFlow, Flow, Lost, Place
from mstc.graph.reach import ancestors, descendants
from mstc.graph.regions import Region, position_only, region_of
from mstc.graph.rules.call import operands_of
from mstc.graph.sizes import Size, product, same, shape_of
from mstc.graph.weights import Weights

_ANY_AXIS = -1  # a stretch along queries lies on no axis of `mstc.graph.axes`: keys stand on the same one


@dataclass(frozen=True)
class Written:
    """One attention that is written out.

    scores: the products of queries and keys, none where nothing proves them; ends: products with values and reductions
    over keys that others read; region: from the scores to the ends, along the queries; keys: where keys stand in
    values of the region; readers: what else reads its scores or weights; draws: random ops in it; whole: values of all
    queries and keys that it reads, since nothing proves that they may be made for a few queries.
    """

    scores: tuple[fx.Node, ...]
    ends: tuple[fx.Node, ...]
    region: Region
    keys: Mapping[fx.Node, Place]
    readers: tuple[fx.Node, ...]
    draws: tuple[fx.Node, ...]
    whole: tuple[fx.Node, ...] = ()


def find_written(graph: fx.Graph) -> Iterator[Written]:
    """All written-out attention: one record for all ends of the same scores that can be computed at once.

    Products come first: what only combines queries and keys, element by element, may be a gate beside their scores.
    """
    search: _Search | None = None
    taken: set[fx.Node] = set()
    inside: set[fx.Node] = set()
    for begins in (is_product, may_combine):
        for node in filter(begins, graph.nodes):
            search = search or _Search(graph)
            if node in taken or (begins is may_combine and (node in inside or search.is_given(node))):
                continue
            for found in search.from_scores(node, taken):
                taken |= {*found.scores, *found.ends}
                inside.update(found.region.nodes)
                yield found


# ------------------------------------------------------------------ what is found on the way


@dataclass(frozen=True)
class _Row:
    """A node that loses the keys: where queries stand in its result, and the keys in those operands that have them."""

    queries: Place
    keys: Mapping[int, Place]


@dataclass
class _Onward:
    """What scores lead to.

    both: nodes in which queries and keys stand; rows: those in which queries are left; readers: all others;
    finer: places of queries and keys in the first product that a view splits the followed ones into.
    """

    both: dict[fx.Node, tuple[Place, Place]]
    rows: dict[fx.Node, _Row] = field(default_factory=dict)
    readers: dict[fx.Node, None] = field(default_factory=dict)
    finer: list[tuple[Place, Place]] = field(default_factory=list)


@dataclass(frozen=True)
class _Until:
    """The nodes up to one of them, in the graph's order."""

    rank: Mapping[fx.Node, int]
    last: int

    def __contains__(self, node: object) -> bool:
        return self.rank[node] <= self.last  # type: ignore[index]


class _Search:
    """The search in one graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.rank = {node: i for i, node in enumerate(graph.nodes)}
        self.weights = Weights(graph)
        self._given = position_only(graph)
        self._flows: dict[fx.Node, Flow | None] = {}

    def is_given(self, node: fx.Node) -> bool:
        """Whether a value is made without tokens (positions, masks) or of weights alone."""
        return node in self._given or self.weights.is_held(node)

    def flow(self, node: fx.Node) -> Flow | None:
        if node not in self._flows:
            self._flows[node] = flow_along(node)
        return self._flows[node]

    # -------------------------------------------------------------- where to start

    def from_scores(self, node: fx.Node, taken: set[fx.Node]) -> list[Written]:
        """What scores begin: by the longest of its places that lead to ends, and that nothing else reads if any."""
        waiting = self._pairs(node)
        tried: set[frozenset[Place]] = set()
        first: list[Written] = []
        while waiting:
            pair = waiting.pop(0)
            if frozenset(pair) in tried:
                continue
            tried.add(frozenset(pair))
            found: list[Written] = []
            for queries, keys in (pair, pair[::-1]):
                if self._may_score(node, queries, keys):
                    onward = self._follow({node: (queries, keys)})
                    found += self._written(onward, taken)
                    waiting = sorted([*waiting, *onward.finer], key=_length, reverse=True)
            inside = {n for written in found for n in written.region.nodes}
            if found and all(w.scores and inside.issuperset(w.readers) for w in found):
                return found
            first = first or found
        return first

    def _pairs(self, node: fx.Node) -> list[tuple[Place, Place]]:
        """Places of the result that may be those of queries and keys, the longest first, then the last."""
        flow = self.flow(node)
        if not isinstance(flow, DimFlow):
            return []
        places = [Place(d, n) for d, n in reversed(list(enumerate(flow.result))) if not same(n, 1)]
        pairs = [(b, a) for i, a in enumerate(places) for b in places[i + 1 :]]
        pairs = [p for p in pairs if self._may_score(node, *p) or self._may_score(node, *p[::-1])]
        return sorted(pairs, key=_length, reverse=True)

    def _may_score(self, node: fx.Node, queries: Place, keys: Place) -> bool:
        """Whether these are scores of queries and keys that chunks of queries may pay for.

        They are no smaller than the keys, which every chunk reads whole; so a state (k^T v, whose "queries" would be
        the features of v) is none. Where nothing is contracted, queries and keys are the longest dimensions: else
        features are combined.
        """
        cut = self._scoring(node, queries, keys)
        flow = self.flow(node)
        if cut is None or not isinstance(flow, DimFlow):
            return False
        contracted = [n for d, n in enumerate(flow.shapes[cut]) if isinstance(flow.carry(cut, Place(d, n)), Lost)]
        if contracted:
            return not _is_shorter(queries.n, product(contracted))
        others = [n for d, n in enumerate(flow.result) if d not in (queries.dim, keys.dim)]
        return not any(_is_shorter(p.n, n) for p in (queries, keys) for n in others)

    def _scoring(self, node: fx.Node, queries: Place, keys: Place) -> int | None:
        """The operand with the queries, where the keys come from another; None where these are no scores.

        A weight gives neither: a router's logits, a linear layer and the products of experts are no scores. But
        queries may be computed of learned ones. Positions give neither, where no product meets them.
        """
        flow = self.flow(node)
        if flow is None:
            return None
        operands = operands_of(node)
        backs = [(flow.back(i, queries), flow.back(i, keys)) for i in range(len(operands))]
        of_queries = [i for i, (q, k) in enumerate(backs) if q is not None and k is None]
        of_keys = [i for i, (q, k) in enumerate(backs) if q is None and k is not None]
        if not of_queries or any(
            self._is_matrix(o) or self.weights.is_raw(o) for o in map(operands.__getitem__, of_queries)
        ):
            return None
        if not of_keys or any(self._is_weight(operands[i]) for i in of_keys):
            return None
        if not is_product(node) and any(self.is_given(operands[i]) for i in (*of_queries, *of_keys)):
            return None
        return of_queries[0]

    def _is_matrix(self, node: fx.Node) -> bool:
        return len(shape_of(node.meta["val"])) <= 2 and self.weights.is_weight(node)

    def _is_weight(self, node: fx.Node) -> bool:
        return self._is_matrix(node) or self.weights.is_held(node)

    # -------------------------------------------------------------- forward: from the scores to the ends

    def _follow(self, starts: Mapping[fx.Node, tuple[Place, Place]]) -> _Onward:
        onward = _Onward(dict(starts))
        first = next(iter(starts))
        stack = list(starts)
        while stack:
            node = stack.pop()
            for user in node.users:
                if user not in onward.both and self._step(node, user, onward, starts[first]):
                    stack += [user]
        return onward

    def _step(self, node: fx.Node, user: fx.Node, onward: _Onward, start: tuple[Place, Place]) -> bool:
        """Note what ``user`` makes of the scores in ``node``; whether queries and keys both stand in it."""
        queries, keys = onward.both[node]
        flow = self.flow(user)
        at = [i for i, operand in enumerate(inputs_of(user)) if operand is node]
        q = self._carried(node, user, queries)
        if flow is None or q is None:
            onward.readers[user] = None
            onward.finer += [(p, start[1]) for p in parts_of(flow, queries, start[0])]
            return False
        k = self._carried(node, user, keys) or kept(flow, at[0], keys)
        if k is not None:
            onward.both[user] = (q, k)
            return True
        if self._reduces(user, flow, at):
            known = onward.rows[user].keys if user in onward.rows else {}
            onward.rows[user] = _Row(q, {**known, **dict.fromkeys(at, keys)})
        else:
            onward.readers[user] = None
            onward.finer += [(start[0], p) for p in parts_of(flow, keys, start[1])]
        return False

    def _reduces(self, node: fx.Node, flow: Flow, at: list[int]) -> bool:
        """Whether a node that loses the keys is a product with values (no weight) or a reduction."""
        others = [o for i, o in enumerate(inputs_of(node)) if i not in at]
        if is_product(node) or is_attention(node):
            return bool(others) and not any(self._is_weight(o) for o in others)
        if not isinstance(flow, DimFlow):
            return False
        results = [Place(d, n) for d, n in enumerate(flow.result) if not same(n, 1)]
        return all(flow.back(i, p) is not None for p in results for i in at)

    # -------------------------------------------------------------- backward: from the ends to the sources

    def _written(self, onward: _Onward, taken: set[fx.Node]) -> Iterator[Written]:
        """One record for each set of ends that can be computed at once."""
        claimed = set(taken)
        for ends in self._together(onward, taken):
            found = self._from_ends(onward, ends, claimed)
            if found is not None:
                claimed |= {n for n, _ in found.region.outputs}
                yield found

    def _together(self, onward: _Onward, taken: set[fx.Node]) -> list[list[fx.Node]]:
        """The ends, parted where one is made of another; what only picks some keys is none."""
        inner = self._between(onward.both, onward.both)
        rows = sorted(onward.rows.keys() - inner - onward.readers.keys() - taken, key=self.rank.__getitem__)
        onward.readers |= dict.fromkeys(row for row in rows if not is_end(row))
        rows = [row for row in rows if is_end(row)]
        groups: list[list[fx.Node]] = []
        for end in [end for row in rows for end in _results(row, onward)]:
            if not groups or end in descendants(groups[-1], _Until(self.rank, self.rank[end])):
                groups.append([])
            groups[-1].append(end)
        return groups

    def _from_ends(self, onward: _Onward, ends: list[fx.Node], claimed: set[fx.Node]) -> Written | None:
        members, keys = self._stretch(onward, ends)
        scores = self._scores(members, keys)
        new = {n: (members[n].place, keys[n]) for n in scores if n not in onward.both}
        if new:  # more scores meet the first: what they lead to is told as well
            starts = {n: (members[n].place, keys[n]) for n in scores}
            onward = self._follow(starts)
            members, keys = self._stretch(onward, ends)
            scores = self._scores(members, keys)
        if not members.keys() >= set(ends):
            return None
        if any(n.target is operator.getitem and n.args[0] not in members for n in members):
            return None
        proofs = {n: members[n] for n in sorted(members, key=self.rank.__getitem__)}
        first = scores or list(onward.both)
        until = _Until(self.rank, max(self.rank[n] for n in proofs))
        later = descendants(first, until)
        within = [n for n in proofs if n in later]
        readers = {u for n in within if n in keys for u in n.users if u not in proofs}
        outputs = [n for n in within if n in ends or (n not in keys and n not in claimed and _leaves(n, proofs))]
        readers |= self._returning(outputs, proofs, until) | onward.readers.keys()
        region = region_of(_ANY_AXIS, proofs, (), outputs)
        inputs = dict.fromkeys(n for n, _ in region.tokens if n in keys)
        whole = [n for n in inputs if n.op == "call_function" and not self.weights.is_held(n)]
        return Written(
            tuple(scores),
            tuple(outputs),
            region,
            keys,
            tuple(sorted(readers - set(proofs), key=self.rank.__getitem__)),
            tuple(n for n in proofs if has_order(n)),
            tuple(whole),
        )

    def _stretch(self, onward: _Onward, ends: list[fx.Node]) -> tuple[dict[fx.Node, Tokenwise], dict[fx.Node, Place]]:
        """The nodes before the ends, with rows of values that others share as well (a decay's maximum)."""
        inner = self._between(onward.both, ends)
        rows = dict(onward.rows)
        members, keys = self._pull(ends, inner, rows)
        while True:
            candidates = self._rows_of(members, keys, rows)
            ways = self._ways(members, candidates) if candidates else set()
            if ways <= inner:
                return members, keys
            inner |= ways
            rows |= candidates
            members, keys = self._pull(ends, inner, rows)

    def _pull(
        self, ends: Iterable[fx.Node], inner: set[fx.Node], rows: Mapping[fx.Node, _Row]
    ) -> tuple[dict[fx.Node, Tokenwise], dict[fx.Node, Place]]:
        """Walk back from the ends, latest node first, so that all readers of a node come before it.

        Taken are nodes in which queries and keys stand, and those in ``inner``, wherever a single place of the queries
        is asked of them. Also returned: where the keys stand.
        """
        wanted: dict[fx.Node, set[Place | None]] = {end: {rows[end].queries} for end in ends}
        keys: dict[fx.Node, Place] = {}
        members: dict[fx.Node, Tokenwise] = {}
        waiting = [(-self.rank[end], end) for end in wanted]
        first = set(wanted)
        heapq.heapify(waiting)
        while waiting:
            _, node = heapq.heappop(waiting)
            proof = self._proof(node, wanted[node]) if node in first or node in keys or node in inner else None
            if proof is None:
                continue
            members[node] = proof
            places = self._keys_of_operands(node, keys.get(node), rows.get(node))
            for i, (operand, need) in enumerate(zip(inputs_of(node), proof.needs, strict=True)):
                if operand not in wanted:
                    wanted[operand] = set()
                    heapq.heappush(waiting, (-self.rank[operand], operand))
                wanted[operand].add(need)
                if i in places and need is not None:
                    keys[operand] = places[i]
        return members, keys

    def _proof(self, node: fx.Node, wanted: set[Place | None]) -> Tokenwise | None:
        """That the node may run on pieces of the one place that is wanted of it.

        What draws stays outside, where its numbers are drawn whole; but a dropout, which weights go through, is a
        member.
        """
        place = next(iter(wanted))
        if has_order(node) and node.target not in DROPOUT:
            return None
        if node.op != "call_function" or len(wanted) != 1 or place is None:
            return None
        flow = self.flow(node)
        if flow is None:
            return None
        needs = tuple(flow.back(i, place) for i in range(len(inputs_of(node))))
        return Tokenwise(place, needs) if any(needs) or flow.repeats else None

    def _keys_of_operands(self, node: fx.Node, keys: Place | None, row: _Row | None) -> dict[int, Place]:
        """Where the keys stand in each operand, as far as they stand in the node or are lost in it."""
        flow = self.flow(node)
        if keys is None and row is not None:
            others = {i: p for at, k in row.keys.items() for i, p in beside(node, at, k)}
            return {**others, **row.keys}
        if keys is None or flow is None:
            return {}
        count = range(len(inputs_of(node)))
        found = {i: flow.back(i, keys) or kept_before(flow, i, keys) for i in count}
        return {i: place for i, place in found.items() if place is not None}

    def _scores(self, members: Mapping[fx.Node, Tokenwise], keys: Mapping[fx.Node, Place]) -> list[fx.Node]:
        """The products of queries and keys in a stretch, or where it has none what combines these first."""
        both = sorted(members.keys() & keys.keys(), key=self.rank.__getitem__)
        scores = [n for n in both if self._scoring(n, members[n].place, keys[n]) is not None]
        return [n for n in scores if is_product(n)] or scores

    def _rows_of(
        self, members: Mapping[fx.Node, Tokenwise], keys: Mapping[fx.Node, Place], known: Mapping[fx.Node, _Row]
    ) -> dict[fx.Node, _Row]:
        """Reductions over the keys of members, beside those that are known."""
        found = _Onward({n: (members[n].place, keys[n]) for n in members.keys() & keys.keys()})
        for node in list(found.both):
            for user in node.users:
                if user not in members and user not in known and not is_product(user):
                    self._step(node, user, found, found.both[node])
        return found.rows

    def _ways(self, members: Mapping[fx.Node, Tokenwise], rows: Mapping[fx.Node, _Row]) -> set[fx.Node]:
        """The nodes on the ways from those rows to the members, but for ways through products."""
        until = _Until(self.rank, max(self.rank[n] for n in members))
        places = {n: row.queries for n, row in rows.items()}
        reached: set[fx.Node] = set()
        stack = list(places)
        while stack:
            node = stack.pop()
            for user in node.users:
                if user in members:
                    reached.add(node)
                elif user not in places and user in until and not is_product(user):
                    place = self._carried(node, user, places[node])
                    if place is not None:
                        places[user] = place
                        stack.append(user)
        return ancestors(reached, set(places))

    def _carried(self, node: fx.Node, user: fx.Node, place: Place) -> Place | None:
        """Where a place of ``node`` stands in what ``user`` makes of it, once and for all."""
        flow = self.flow(user)
        at = [i for i, operand in enumerate(inputs_of(user)) if operand is node]
        return one_of(flow.carry(i, place) for i in at) if flow is not None else None

    def _between(self, first: Iterable[fx.Node], last: Iterable[fx.Node]) -> set[fx.Node]:
        """The nodes on the ways from the first ones to the last."""
        last = list(last)
        until = _Until(self.rank, max(self.rank[n] for n in last))
        return ancestors(last, descendants(first, until))

    def _returning(self, outputs: list[fx.Node], proofs: Mapping[fx.Node, Tokenwise], until: _Until) -> set[fx.Node]:
        """What reads an output outside and leads back into the stretch."""
        outside = {u for n in outputs for u in n.users if u not in proofs and u in until}
        return {u for u in outside if any(user in proofs for n in descendants([u], until) for user in n.users)}


def _results(row: fx.Node, onward: _Onward) -> list[fx.Node]:
    """The row itself, or where it is several results (values and indices of a maximum) those that are read."""
    if isinstance(row.meta["val"], torch.Tensor):
        return [row]
    onward.rows |= {item: _Row(onward.rows[row].queries, {}) for item in row.users}
    return list(row.users)


def _leaves(node: fx.Node, members: Mapping[fx.Node, Tokenwise]) -> bool:
    return isinstance(node.meta["val"], torch.Tensor) and any(u not in members for u in node.users)


def _is_shorter(n: Size, other: Size) -> bool:
    """Whether a length is below another; what is known is below what is dynamic."""
    return isinstance(n, int) and (not isinstance(other, int) or n < other)


def _length(pair: tuple[Place, Place]) -> int:
    return math.prod(p.n if isinstance(p.n, int) else UNKNOWN_LENGTH for p in pair)
