"""Where a region is cut into loops.

*Head.* The part of a region that ends in a loss starts just before its last matrix products, at the
narrowest values (a minimum cut in bytes per token), nearest to the source, so that the final norm is inside.

*Recomputation.* Outputs that only mixers read (q, k, v) are computed again in the backward from values
that are kept anyway (the residual stream): the part that leads only to them becomes a loop of its
own, tagged for recomputation. What it may not compute again (products that the rest needs too) is
cut off by a minimum cut as well.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch.fx as fx

from mstc.graph.axes import Axes
from mstc.graph.costs import is_heavy, nbytes
from mstc.graph.cuts import narrowest
from mstc.graph.reach import ancestors, descendants
from mstc.graph.regions import Region, make_region


@dataclass(frozen=True)
class Part:
    """One loop to be: its region, and whether it runs again in the backward."""

    region: Region
    recompute: bool = False
    loss: bool = False


def split_head(axes: Axes, region: Region) -> tuple[Region | None, Region]:
    """(what comes before, the head with its loss) of a region that ends in sums."""
    within = set(region.nodes)
    ends = [i for s in region.sums for i in s.all_input_nodes]
    head = head_of(region, ends)
    # Other values made from the head's (an argmax beside the loss) stay with it as outputs.
    head |= {n for n in descendants(head, within) if not is_heavy(n)}
    rest = within - head
    if any(i in head for n in rest for i in n.all_input_nodes) or not any(is_heavy(n) for n in rest):
        return None, region
    return make_region(axes, region.axis, rest, ()), make_region(axes, region.axis, head, region.sums)


def head_of(region: Region, ends: Sequence[fx.Node]) -> set[fx.Node]:
    """What leads to ``ends`` from the narrowest values before its last matrix products.

    Where these read something wider than the products before them do (a soft embedding reads probabilities of all
    classes), those belong to the head too.
    """
    within = ancestors(ends, set(region.nodes))
    products = {n for n in within if is_heavy(n)}
    last = _last(products, within)
    head = _from_narrowest(products, last, ends, within)
    while before := _last(products - last, within):
        more = _from_narrowest(products, last | before, ends, within)
        if read_by(region, more) >= read_by(region, head):
            break
        last, head = last | before, more
    return head


def read_by(region: Region, head: Collection[fx.Node]) -> int:
    """Bytes of what a part of a region reads of its tokens."""
    tokens = {n for n, _ in region.tokens}
    inputs = {i for n in head for i in n.all_input_nodes if i not in head}
    return sum(nbytes(i) for i in inputs if i in tokens or i in region.proofs)


def _last(products: set[fx.Node], within: set[fx.Node]) -> set[fx.Node]:
    """The products that no other one of them reads."""
    return {n for n in products if not (descendants([n], within) - {n}) & products}


def _from_narrowest(
    products: set[fx.Node], last: set[fx.Node], ends: Sequence[fx.Node], within: set[fx.Node]
) -> set[fx.Node]:
    """What leads to the ends, with the last products, from the narrowest values behind all other products."""
    # What leads to earlier products stays with them: the rest may not read what the head makes.
    before = ancestors(products - last, within) - set(ends)
    # The last products belong to the head even where their own results are the narrowest values.
    return narrowest(within, before, [*ends, *last], set(), nbytes) if before else within


def split_recompute(axes: Axes, region: Region, kept_anyway: Callable[[fx.Node], bool]) -> list[Part]:
    """The trunk of a region, and the part that leads only to what mixers read.

    kept_anyway: whether an output is read by another region or returned by the graph.
    """
    within = set(region.nodes)
    kept_by_others = {n for n, _ in region.outputs if kept_anyway(n)}
    trunk = ancestors([*kept_by_others, *(i for s in region.sums for i in s.all_input_nodes)], within)
    kept = {n for n, _ in region.outputs if n in trunk}
    ends = [n for n, _ in region.outputs if n not in trunk]
    if not ends:
        return [Part(region)]
    again = narrowest(within, {n for n in trunk if is_heavy(n)}, ends, kept, nbytes) - kept
    if not any(is_heavy(n) for n in again):
        return [Part(region)]
    # Values where the recomputation starts, besides the trunk's own, are made once and kept.
    starts = {i for n in again for i in n.all_input_nodes if i in within and i not in again}
    first = ancestors([*trunk, *starts], within)
    if not any(is_heavy(n) for n in first):
        return [Part(region, recompute=not kept)]
    once = [n for n in region.nodes if n in kept or n in starts]
    return [
        Part(make_region(axes, region.axis, first, region.sums, once)),
        Part(make_region(axes, region.axis, again, (), ends), recompute=True),
    ]
