"""Convex stretches of tokenwise nodes: which of them may run as one loop.

With T the set of tokenwise nodes of an axis, every node gets a stage:

    stage(n) = max over operands p of  stage(p) + 1 if p in T and n not in T, else stage(p)

A path that leaves T and comes back raises the stage, so the nodes of T with equal stage form convex stretches. Those
are the earliest stages. A node may wait for a later one, as long as what leaves T behind it comes back later still: so
the head of a shallow teacher meets the student's in their loss, where each would else make all of its logits.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping

import torch.fx as fx

from mstc.graph.axes import Tokenwise
from mstc.graph.costs import nbytes
from mstc.graph.cuts import narrowest
from mstc.graph.editor import has_order
from mstc.graph.rules.call import operands_of

# Values are made later, next to their readers, where what they are made of is so many times smaller.
WAITS = 2

Proofs = Mapping[fx.Node, Tokenwise]


def stretches(graph: fx.Graph, proofs: Proofs, sums: Callable[[fx.Node], bool]) -> list[set[fx.Node]]:
    """The connected stretches of equal stage. sums: whether a node is a sum over the axis."""
    stage = _earliest(graph, proofs)
    _lift_masks(stage, proofs)
    _lift_wide(graph, stage, proofs, sums)
    return _connected(stage, proofs)


def _earliest(graph: fx.Graph, proofs: Proofs) -> dict[fx.Node, int]:
    stage: dict[fx.Node, int] = {}
    for node in graph.nodes:
        leaves = node not in proofs
        stage[node] = max((stage[p] + (leaves and p in proofs) for p in node.all_input_nodes), default=0)
    return stage


def _lift_masks(stage: dict[fx.Node, int], proofs: Proofs) -> None:
    """Put what is made of random draws alone into the stage of its first user: it waits for nothing."""
    masks: set[fx.Node] = set()
    for node in proofs:
        if node.all_input_nodes and all(i in masks or has_order(i) for i in node.all_input_nodes):
            masks.add(node)
    for node in reversed(list(proofs)):
        if node in masks and node.users and all(u in proofs for u in node.users):
            stage[node] = max(stage[node], min(stage[u] for u in node.users))


# -- what waits ----------------------------------------------------------------------------------------


def _lift_wide(graph: fx.Graph, stage: dict[fx.Node, int], proofs: Proofs, sums: Callable[[fx.Node], bool]) -> None:
    """Let what only later stages need wait for them, from its narrowest values on, with all that is made of it."""
    for later in sorted({stage[n] for n in proofs}):
        limits = _latest(graph, stage, proofs)
        movable = {n for n in proofs if stage[n] < later <= limits[n]}
        readers = {u for n in movable for u in n.users if u in proofs and stage[u] == later}
        if readers:
            moved = _from_narrowest(movable, readers, proofs)
            if _crossing(moved, proofs, sums) > WAITS * sum(map(nbytes, _read(moved, proofs, readers))):
                stage.update(dict.fromkeys(moved, later))


def _latest(graph: fx.Graph, stage: Mapping[fx.Node, int], proofs: Proofs) -> dict[fx.Node, float]:
    """The latest stage of each node: of T, if its readers in T wait too; before what its other readers lead to."""
    latest: dict[fx.Node, float] = {}
    for node in reversed(graph.nodes):
        leaves = node not in proofs
        ends = (stage[u] - 1 if leaves and u in proofs else latest[u] for u in node.users)
        latest[node] = min(ends, default=math.inf)
    for node in proofs:
        if node.target is operator.getitem:  # a result goes where what makes several of them goes
            latest[node] = min(latest[node], latest[node.all_input_nodes[0]])
    return latest


def _from_narrowest(movable: set[fx.Node], readers: set[fx.Node], proofs: Proofs) -> set[fx.Node]:
    inputs = {i for n in movable for i in n.all_input_nodes} - movable
    tokens = set(_read(movable, proofs, ()))
    shared = inputs - tokens
    within = movable | readers | inputs
    return movable & narrowest(within, inputs - readers, list(readers), shared, nbytes, with_readers=True)


def _read(nodes: Collection[fx.Node], proofs: Proofs, known: Collection[fx.Node]) -> set[fx.Node]:
    """What the nodes read of each token from outside them; known: what is there anyway."""
    found: set[fx.Node] = set()
    for node in nodes:
        pairs: Iterator[tuple[fx.Node, object]] = zip(operands_of(node), proofs[node].needs, strict=False)
        found |= {i for i, need in pairs if need is not None and i not in nodes and i not in known}
    return {i for i in found if i.op != "call_function" or i.all_input_nodes}  # a constant is made by who reads it


def _crossing(nodes: Collection[fx.Node], proofs: Proofs, sums: Callable[[fx.Node], bool]) -> int:
    """Bytes of the nodes that are kept only since other tokenwise nodes read them later."""
    kept = [n for n in nodes if all(u in proofs or sums(u) for u in n.users)]
    return sum(nbytes(n) for n in kept if any(u in proofs and u not in nodes for u in n.users))


def _connected(stage: Mapping[fx.Node, int], proofs: Proofs) -> list[set[fx.Node]]:
    parent: dict[fx.Node, fx.Node] = {}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for node in proofs:
        parent[node] = node
        for p in node.all_input_nodes:
            if p in proofs and stage[p] == stage[node]:
                parent[find(node)] = find(p)
    groups: dict[fx.Node, set[fx.Node]] = {}
    for node in proofs:
        groups.setdefault(find(node), set()).add(node)
    return list(groups.values())
